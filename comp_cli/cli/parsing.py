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
from . import recipes
from .exit_codes import FAILED
from .output import Output
from .streams import asked_mode

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
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as refused:
            raise self._placed(ctx, refused) from None

    def _placed(self, ctx: Any, refused: typer.BadParameter) -> typer.BadParameter:
        """What the parser refused, with the place in a file that says it where nobody typed it."""
        refused.message = refused.message.removeprefix("Value error, ")  # which pydantic, behind the parser, puts there
        if refused.param is not None and (where := recipes.followed(ctx).get(str(refused.param.name))):
            refused.message = f"{where}: {refused.message}"
        return refused

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """In a document where one was asked for."""
        if Output.asked != "json" or not Commands.speaks:
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
        _settle_mode(ctx)
        return super().invoke(ctx)


class Commands(TyperGroup):
    """All commands. An end that no command has told gets its document here."""

    speaks = True  # whether this process does; of several the first one

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        Output.spoke, Output.command, Output.asked = False, shlex.join(["comp", *words]), asked_mode(words)
        Commands.speaks = os.environ.get("RANK", "0") == "0"
        try:
            return super().main(args, *rest, **options)
        except SystemExit as end:
            if Commands.speaks and end.code and not Output.spoke:
                Output(Output.asked or "human").error(_refusal(end), say=False)
            raise


def _settle_mode(ctx: Any) -> None:
    """Make one mode of output of three options: what was typed goes before what a recipe says, and there before --format.
    Raises typer.BadParameter for several."""
    if "form" not in ctx.params:
        return
    wanted: dict[str, set[str]] = {"COMMANDLINE": set(), "DEFAULT_MAP": set()}
    for name, mode in (("form", ctx.params["form"]), ("as_json", "json"), ("quiet", "quiet")):
        source = ctx.get_parameter_source(name)
        if ctx.params[name] and source is not None and source.name in wanted:
            wanted[source.name].add(mode)
    found = wanted["COMMANDLINE"] or wanted["DEFAULT_MAP"] or {"human"}
    if len(found) > 1:
        raise typer.BadParameter(f"{' and '.join(sorted(found))} output at once: choose one.", ctx=ctx)
    Output.asked = found.pop()
    ctx.params |= {"form": Output.asked, "as_json": False, "quiet": False}


def _refusal(end: SystemExit) -> CompError:
    """What the parser said before it ended the process."""
    refused = end.__context__
    said = getattr(refused, "format_message", lambda: "see stderr.")()
    ctx = getattr(refused, "ctx", None)
    code = end.code if isinstance(end.code, int) else FAILED
    return CompError(said, exit_code=code, hint=f"{ctx.command_path if ctx else 'comp'} --help")
