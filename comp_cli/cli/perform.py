"""How a command runs: what was typed to a function of the library, its report to where results go, its end to an exit code."""

import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer

from ..errors import CompError, UsageError, explain
from ..report.base import Report
from ..signals import Interrupted
from . import recipes
from .output import Output

OWN = r".*is not one that this runtime"  # begins the warning of comp's runtime, wherever that lies
# Options that are the terminal's.
OUTPUT = {"recipe": None, "form": "human", "as_json": False, "quiet": False, "no_progress": False}


def nowhere(report: Any) -> None:
    """The path of the result of a command that writes none."""


def perform(
    context: typer.Context,
    call: Callable[[dict[str, Any], Output], Report],
    show: Callable[[Any, Output], None],
    path: Callable[[Any], Path | None] = nowhere,
    *,
    resumes: bool = False,
) -> None:
    """Call the library with what was typed, and end with its result, or with one sentence and the right exit code.

    call: gets the options by name, those of the terminal left out. show: prints the report for people. path: what quiet mode
    prints of it. resumes: whether the command has a journal.
    """
    given = dict(context.params)
    out = output_of({name: given.pop(name, default) for name, default in OUTPUT.items()})
    error: CompError
    try:
        with redirect_stdout(sys.stderr), own_warnings(out):
            check_place()
            tell_recipe(context, out)
            report = call(given, out)
            show(report, out)
        found = path(report)
        out.result(report.to_json(), None if found is None else str(found))
        return
    except CompError as raised:
        error = raised
        name_recipe(context, error)
        trace()
    except (Interrupted, KeyboardInterrupt) as raised:
        error = interruption(raised, resumes, context)
    except Exception as raised:
        error = explain(raised)
        trace()
    out.error(error)
    raise typer.Exit(error.exit_code)


@contextmanager
def own_warnings(out: Output) -> Iterator[None]:
    """Of Python's warnings only those that comp's runtime gives, as those of the command; what libraries say to each other is
    for who asks (COMP_DEBUG, python -W)."""
    if os.environ.get("COMP_DEBUG") or sys.warnoptions:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message=OWN)
        warnings.showwarning = lambda message, *_: out.warn(str(message))
        yield


def output_of(chosen: dict[str, Any]) -> Output:
    """Where the command speaks; of several processes that `accelerate launch` started, the first one alone."""
    first = os.environ.get("RANK", "0") == "0"
    return Output(chosen["form"] if first else "mute", progress=not chosen["no_progress"])


def tell_recipe(context: typer.Context, out: Output) -> None:
    """Say which options nobody typed. Of a file that nobody named either, whatever the mode."""
    if names := recipes.followed(context):
        file = recipes.file_of(context)
        told = ", ".join(f"{spelled(context, name)} {context.params[name]}" for name in names)
        (out.say if file.asked else out.tell)(f"options from {file.shown}: {told}")


def name_recipe(context: typer.Context, error: CompError) -> None:
    """Add to what is refused where it stands, if that is a file."""
    if isinstance(error, UsageError):
        ends = {name: re.escape(spelled(context, name)) + r"(?![\w-])" for name in recipes.followed(context)}
        where = [recipes.followed(context)[name] for name, pattern in ends.items() if re.search(pattern, error.message)]
        error.hint = "\n".join(filter(None, [error.hint, *(f"See {place}." for place in where)])) or None


def spelled(context: typer.Context, name: str) -> str:
    """A parameter as it is typed: --json, MODEL."""
    found = next(one for one in context.command.params if one.name == name)
    return found.opts[0] if found.opts[0].startswith("-") else name.upper()


def check_place() -> None:
    """Raises UsageError where the current folder was deleted: torch would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder is gone.", hint="Change to another one.") from None


def trace() -> None:
    if os.environ.get("COMP_DEBUG"):
        traceback.print_exc()


def interruption(end: BaseException, resumes: bool, context: typer.Context | None = None) -> CompError:
    """With the command line that goes on; how several processes were started, they do not know."""
    end = end if isinstance(end, Interrupted) else Interrupted(signal.SIGINT)
    if resumes and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return CompError(
            f"{end.said}.", exit_code=end.code, hint="The same launch, of as many processes, goes on where it was."
        )
    again = " ".join(word for word in Output.command.split(" ") if word != "--no-resume")
    if resumes and context is not None and "resume" in recipes.followed(context):
        again += " --resume"  # whatever the recipe says
    hint = f"The same command goes on where it was: {again}" if resumes else f"Start it again: {again}"
    return CompError(f"{end.said}.", exit_code=end.code, hint=hint)
