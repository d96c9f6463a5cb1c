"""The command line: a thin layer over the library. Options and wording only; what is heavy is imported by commands that run."""

import shlex
import sys
from typing import Annotated, Any

import typer

from .. import __version__, signals
from ..errors import CompError
from ..signals import Interrupted
from . import streams
from .analyze import analyze
from .bench import bench
from .compare import compare
from .env import env
from .exit_codes import FAILED, MEANING
from .export import export
from .output import Output, Unprintable
from .parsing import Command, Commands
from .perform import interruption
from .prune import EPILOG, prune
from .upgrade import upgrade

app = typer.Typer(
    name="comp",
    cls=Commands,
    help="Make vision-language models smaller and faster: prune heads, channels and tokens together, export, measure.",
    epilog="Exit codes:\n\n" + "\n\n".join(f"* `{code}`: {meaning}" for code, meaning in MEANING.items()),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (analyze, prune, export, bench, compare, env, upgrade):
    app.command(cls=Command, epilog=EPILOG if command is prune else None)(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"comp {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def run_command(has_stdout: bool = True) -> None:
    """The command of this process's arguments, in streams that are settled. Exit 1 where stdout takes nothing."""
    code: Any = 0
    try:
        if not has_stdout:
            hint = "Lead it somewhere, if only to /dev/null."
            raise Unprintable("stdout is closed: the result could not be told.", hint=hint)
        app(prog_name="comp")
    except SystemExit as end:
        code = end.code
    except Unprintable as error:
        code = error.exit_code
        Output().error(error)
    except OSError as error:  # of help texts; commands end well
        code = FAILED
        Output().error(CompError(f"stdout: {error.strerror}."))
    except Interrupted as end:
        end_early(end)
    _end(code)


def end_early(end: Interrupted) -> None:
    """A signal before a command began, or behind its end."""
    mode = "human" if Output.spoke else streams.asked_mode(sys.argv[1:]) or "human"
    Output.command = shlex.join(["comp", *sys.argv[1:]])
    error = interruption(end, False)
    Output(mode).error(error)
    _end(error.exit_code)


def _end(code: Any) -> None:
    signals.ignore()
    if (failed := streams.close_stdout()) is not None and code in (0, None):
        code = FAILED
        Output().error(CompError(f"stdout: {failed.strerror}."))
    raise SystemExit(code)
