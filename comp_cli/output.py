"""The one sink: results go to stdout, everything else to stderr. Modes are human, json and quiet."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .errors import CompError

SCHEMA_VERSION = 1
MODES = ("human", "json", "quiet")


class Output:
    """Where a command speaks. With "json" exactly one document goes to stdout; with "quiet" only the result's path."""

    spoke = False  # whether a document was printed in this process

    def __init__(self, mode: str = "human", progress: bool = True):
        self.mode = mode
        self.console = Console(stderr=True, highlight=False)
        self.stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        self.show_progress = progress and mode == "human" and self.console.is_terminal
        self.warnings: list[str] = []

    def say(self, message: str) -> None:
        """A line about what is being done."""
        if self.mode == "human":
            self.console.print(printable(message), markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Something the user should know; part of the JSON document as well."""
        self.warnings.append(message)
        if self.mode != "quiet":
            self.console.print(f"[yellow]warning:[/] {escape(printable(message))}", soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator["Bar"]:
        """A bar with the time left; a plain line where stderr is no terminal."""
        if not self.show_progress:
            self.say(f"{title} ...")
            yield Bar(None, None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield Bar(progress, progress.add_task(printable(title), total=total))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table for people, on stdout; the first column is text, the others are numbers."""
        if self.mode != "human":
            return
        table = Table(title=escape(printable(title)), title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(printable(str(cell))) for cell in row))
        self.stdout.print(table)

    def line(self, message: str) -> None:
        """A line of the result for people."""
        if self.mode == "human":
            self.stdout.print(printable(message), markup=False, soft_wrap=True)

    def result(self, document: dict[str, Any], path: str | None = None) -> None:
        """The end of a command: the JSON document, or in quiet mode the path that was written."""
        if self.mode == "json":
            self._document(document)
        elif self.mode == "quiet" and path:
            print(path)

    def _document(self, content: dict[str, Any]) -> None:
        Output.spoke = True
        print(json.dumps({"schema_version": SCHEMA_VERSION} | content | {"warnings": self.warnings}))

    def error(self, error: CompError, say: bool = True) -> None:
        """One sentence, and what to do next. In JSON mode the document says the same, beside the report if there is one."""
        if self.mode == "json":
            told = {"code": error.code, "message": error.message, "hint": error.hint}
            self._document(error.document | {"error": told})
        if not say:
            return
        self.console.print(f"[red]error:[/] {escape(printable(error.message))}", soft_wrap=True)
        if error.hint:
            self.console.print(f"[dim]{escape(printable(error.hint))}[/]", soft_wrap=True)


class Bar:
    """A progress bar that may be absent."""

    def __init__(self, progress: Progress | None, task):
        self._progress, self._task = progress, task

    def advance(self, title: str | None = None, by: int = 1) -> None:
        if self._progress is not None:
            self._progress.update(self._task, advance=by, description=printable(title) if title else None)


def printable(text: str) -> str:
    """The text without terminal control characters: names from files and the hub are printed as they are spelled."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
