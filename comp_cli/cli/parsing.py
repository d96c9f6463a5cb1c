"""What the parser refuses for every command and option, and the document that says so where one was asked for."""

import io
import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import CompError, UsageError
from ..option_values import EMPTY_IS_NONE, check_text
from ..options import flag
from .exit_codes import FAILED
from .output import MODES, Output
from .streams import wants_json

SHORT = ("-o",)  # options of one letter with a value, which for the parser would begin with the =


class Command(TyperCommand):
    """A command whose words are text, whose numbers are finite, and whose mode of output is one. Exit 2 otherwise."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in zip(["", *args], args, strict=False):
            name, attached, value = word.partition("=")
            if attached and name in SHORT:
                said = f"{word}: the value of {name} stands behind a space: {name} {value or 'FOLDER'}."
                raise typer.BadParameter(said, ctx=ctx)
            if not (attached and name.startswith("--")):
                name, value = before, word
            about = name if name.startswith("-") else "an argument"
            try:
                check_text(about, word if value else "", may_be_empty=name in map(flag, EMPTY_IS_NONE))
            except UsageError as refused:
                raise typer.BadParameter(refused.message, ctx=ctx) from None
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """In a document where one was asked for."""
        if not Commands.tells_document:
            return super().format_help(ctx, formatter)
        with redirect_stdout(io.StringIO()) as said:
            super().format_help(ctx, formatter)
        Output("json").result({"help": said.getvalue()})

    def invoke(self, ctx: Any) -> Any:
        params: list[Any] = self.params  # of classes that typer keeps to itself
        for param in params:
            value = ctx.params.get(param.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number.", ctx=ctx, param=param)
        _check_mode(ctx)
        return super().invoke(ctx)


class Commands(TyperGroup):
    """All commands. An end that no command has told gets its document here."""

    tells_document = False  # whether the command line asks for one

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        Output.spoke, Output.command = False, shlex.join(["comp", *words])
        Commands.tells_document = os.environ.get("RANK", "0") == "0" and wants_json(words)
        try:
            return super().main(args, *rest, **options)
        except SystemExit as end:
            if Commands.tells_document and end.code and not Output.spoke:
                Output("json").error(_refusal(end), say=False)
            raise


def _check_mode(ctx: Any) -> None:
    form, given = ctx.params.get("form"), ctx.get_parameter_source("form")
    if form is None:
        return
    if form not in MODES:
        raise typer.BadParameter(f"--format {form}: unknown. Use one of {', '.join(MODES)}.", ctx=ctx)
    wanted = {mode for mode, flag in (("json", "as_json"), ("quiet", "quiet")) if ctx.params.get(flag)}
    wanted |= {form} if given is not None and given.name == "COMMANDLINE" else set()
    if len(wanted) > 1:
        raise typer.BadParameter(f"{' and '.join(sorted(wanted))} output at once: choose one.", ctx=ctx)


def _refusal(end: SystemExit) -> CompError:
    """What the parser said before it ended the process."""
    refused = end.__context__
    said = getattr(refused, "format_message", lambda: "see stderr.")()
    ctx = getattr(refused, "ctx", None)
    code = end.code if isinstance(end.code, int) else FAILED
    return CompError(said, exit_code=code, hint=f"{ctx.command_path if ctx else 'comp'} --help")
