"""The one sink: results go to stdout, everything else to stderr. Modes are those of `streams.MODES`."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from textwrap import wrap
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import CompError
from ..progress import Bar, NoBar
from . import github, markdown
from .exit_codes import MEANING

SCHEMA_VERSION = 1
TALKING = ("human", "markdown", "github")  # modes in which what is done is said
LINE_SECONDS = 15  # at least between two lines of progress where stderr is no terminal


class Unprintable(CompError):
    """stdout does not take the result: it is full, or its reader is gone."""


class Output:
    """Where a command speaks. With "json" exactly one document goes to stdout; with "markdown" tables, warnings and errors;
    with "github" annotations among what people read, and the Markdown to the summary of the step; with "quiet" only the
    result's path; with "mute" nothing goes anywhere (all processes but the first)."""

    asked = ""  # the mode of the command that runs, as far as it is known before its parser is done
    spoke = False  # whether its end was told on stdout
    command = "comp"  # the command line that runs

    def __init__(self, mode: str = "human", progress: bool = True):
        self.mode = mode
        self.console = Console(stderr=True, highlight=False)
        self.results = sys.stdout  # while a command works, what others print goes to stderr
        self.wraps = self.results.isatty() or "COLUMNS" in os.environ  # elsewhere a line is a line
        self.stdout = Console(file=self.results, highlight=False, width=None if self.wraps else 120)
        self.tells_progress = progress and mode in TALKING
        self.shows_bars = self.tells_progress and self.console.is_terminal
        self.warnings: list[str] = []
        self.summary: list[str] = []  # Markdown for the summary of the step

    def say(self, message: str) -> None:
        """A line about what is being done."""
        if self.mode in TALKING:
            self.tell(message)

    def tell(self, message: str) -> None:
        """A line on stderr that no mode keeps back: what changes a run that nobody typed."""
        if self.mode != "mute":
            self.console.print(self._shown(message), markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Something the user should know; part of the JSON document and of the Markdown as well."""
        self.warnings.append(message)
        if self.mode == "github":
            self._annotate("warning", "warning", message)
        elif self.mode in ("human", "json", "markdown"):
            self.console.print(f"[yellow]warning:[/] {escape(printable(message))}", soft_wrap=True)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Bar]:
        """A bar with the time left; now and then a plain line where stderr is no terminal."""
        if not self.shows_bars:
            self.say(f"{title} ...")
            yield Lines(self.say, title, total) if self.tells_progress else NoBar()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = TerminalBar(progress, progress.add_task(printable(title), total=total), total)
            yield bar
            bar.end()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table on stdout; the first column is text, the others are numbers."""
        cells = [[printable(str(cell)) for cell in row] for row in rows]
        self._mark(markdown.table(printable(title), columns, cells))
        if self.mode not in ("human", "github"):
            return
        widths, padding = column_widths([list(columns), *cells], self.stdout.width)
        table = Table(padding=(0, padding))
        for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
            table.add_column(escape(column), justify="right" if index else "left", overflow="fold", width=width)
        for row in cells:
            table.add_row(*map(escape, row))
        self._line(self._shown(title), "bold")
        self._print(table)

    def line(self, message: str) -> None:
        """A line of the result; in a terminal it wraps at words, but for a command that is to be copied."""
        self._mark(markdown.paragraph(printable(message)))
        if self.mode in ("human", "github"):
            self._line(self._shown(message))

    def _line(self, text: str, style: str = "") -> None:
        if self.wraps and not text.startswith("Next: "):  # a path that is longer than a line stays whole
            lines = (
                wrap(line, self.stdout.width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
            )
            text = "\n".join("\n".join(parts) for parts in lines)
        self._print(Text(text, style), soft_wrap=True)

    def result(self, document: dict[str, Any], path: str | None = None) -> None:
        """The end of a command: the JSON document, the warnings in Markdown, values for later steps, or in quiet mode the path
        that was written."""
        if self.mode == "json":
            self._document(document)
        elif self.mode == "quiet" and path:
            self._write(os.fsdecode(path) + "\n", exactly=True)
        else:
            self._end_markdown()
        if self.mode == "github":
            told = {"output": path, "ratio": document.get("ratio")}
            self._hand_over(lambda: github.set_outputs({name: str(value) for name, value in told.items() if value is not None}))

    def _mark(self, text: str) -> None:
        """A piece of Markdown, where this mode has any: to stdout, or for the summary of the step."""
        if self.mode == "markdown":
            self._write(text + "\n")
        elif self.mode == "github":
            self.summary.append(text + "\n")

    def _end_markdown(self, error: CompError | None = None) -> None:
        """Warnings, the error, and with that all that goes to the summary."""
        for warning in self.warnings:
            self._mark(markdown.alert("WARNING", printable(warning)))
        if error is not None:
            self._mark(markdown.alert("CAUTION", printable(_with_hint(error))))
        if self.mode == "github":
            self._hand_over(lambda: github.append_summary("".join(self.summary)))

    def _hand_over(self, write: Callable[[], None]) -> None:
        """Write to a file of the workflow. That it cannot be written changes no result."""
        try:
            write()
        except OSError as failed:
            said = f"{failed.filename}: {failed.strerror}: the workflow is told nothing there."
            self._annotate("warning", "warning", said)

    def _annotate(self, kind: str, title: str, message: str) -> None:
        named = " ".join(word for word in Output.command.split(" ")[:2] if word.isalpha())
        line = github.annotation(kind, printable(f"{named}: {title}"), printable(message))
        try:
            self._write(line + "\n")
        except Unprintable:  # a log is one, whichever stream it comes by
            self.console.print(line, markup=False, soft_wrap=True)

    def _shown(self, text: str) -> str:
        return github.harmless(printable(text)) if self.mode == "github" else printable(text)

    def _document(self, content: dict[str, Any]) -> None:
        Output.spoke = True
        self._write(json.dumps({"schema_version": SCHEMA_VERSION} | content | {"warnings": self.warnings}) + "\n")

    def _print(self, what: Any, **how: Any) -> None:
        with self.stdout.capture() as captured:
            self.stdout.print(what, **how)
        self._write(captured.get())

    def _write(self, text: str, exactly: bool = False) -> None:
        """Raises CompError where stdout fails. `exactly`: as the bytes of the file system, whatever the encoding of the
        terminal."""
        try:
            if exactly:
                self.results.flush()
                self.results.buffer.write(os.fsencode(text))
            else:
                self.results.write(text)
            self.results.flush()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            hint = "What the command wrote to disk is complete; only the words about it are lost."
            raise Unprintable(f"the result cannot be written to stdout: {why}.", hint=hint) from error

    def error(self, error: CompError, say: bool = True) -> None:
        """One sentence, and what to do next: on stderr, in GitHub's log as an annotation. In JSON mode the document says the
        same, beside the report if there is one; in Markdown a box. say: whether stderr has not said it yet."""
        told = not say or self.mode == "mute"
        with suppress(Unprintable):  # it is said on stderr
            if self.mode == "json":
                found = {"code": error.exit_code, "message": error.message, "hint": error.hint}
                self._document(error.document | {"error": found})
            elif self.mode in ("markdown", "github"):
                Output.spoke = True
                self._end_markdown(error)
            if self.mode == "github":
                self._annotate("error", MEANING.get(error.exit_code, "failed"), _with_hint(error))
                told = True
        if told:
            return
        self.console.print(f"[red]error:[/] {escape(self._shown(error.message))}", soft_wrap=True)
        if error.hint:
            self.console.print(f"[dim]{escape(self._shown(error.hint))}[/]", soft_wrap=True)


def _with_hint(error: CompError) -> str:
    return "\n".join(filter(None, (error.message, error.hint)))


class TerminalBar:
    """A moving bar. A total that was expected, and is passed, grows with every step: there is at least one more."""

    def __init__(self, progress: Progress, task: TaskID, total: int):
        self._progress, self._task, self._total, self._done = progress, task, total, 0

    def advance(self, title: str | None = None, by: int = 1) -> None:
        self._done += by
        if self._done > self._total:
            self._total = self._done + 1
        said = printable(title) if title else None
        self._progress.update(self._task, advance=by, total=self._total, description=said)

    def end(self) -> None:
        """All is done, be it more or less than was expected."""
        self._progress.update(self._task, total=self._done, refresh=True)


class Lines:
    """For logs: a plain line after a step, if the last one is LINE_SECONDS ago. The time left is what the steps after the
    first call took, so that neither the start nor the steps of a run that is resumed count."""

    def __init__(self, say: Callable[[str], None], title: str, total: int, clock: Callable[[], float] = time.monotonic):
        self._say, self._title, self._total, self._clock = say, title, total, clock
        self._done, self._said = 0, clock()
        self._first: tuple[float, int] | None = None  # when the first call came, and what was done then

    def advance(self, title: str | None = None, by: int = 1) -> None:
        now, self._done = self._clock(), self._done + by
        self._first = self._first or (now, self._done)
        if now - self._said < LINE_SECONDS or self._done == self._total:
            return
        self._said = now
        of = f"/{self._total}" if self._done < self._total else f", {self._total} were expected"
        said = [f"{self._title}: {self._done}{of}"] + ([title] if title else [])
        begun, before = self._first
        if before < self._done < self._total:
            left = (now - begun) / (self._done - before) * (self._total - self._done)
            said.append(f"about {duration(left)} left")
        self._say(", ".join(said))


def column_widths(rows: Sequence[Sequence[str]], width: int) -> tuple[list[int], int]:
    """Widths of the columns of a table that is `width` wide, borders included, and the padding at both sides of a cell.

    rows: the header first. Where all cannot stand in one line, headers wrap at words, then the texts of the first column, then
    padding goes. Numbers stay whole.
    """
    columns = [[cell_len(cell) for cell in column] for column in zip(*rows, strict=True)]
    widest = [max(column) for column in columns]
    whole = [max([_longest_word(head), *column[1:]]) for head, column in zip(rows[0], columns, strict=True)]
    words = [max(_longest_word(row[0]) for row in rows), *whole[1:]]
    for widths, padding in ((widest, 1), (whole, 1), (words, 1), (words, 0)):
        room = width - (2 * padding + 1) * len(widths) - 1 - sum(widths[1:])  # for the first column
        if room >= widths[0]:
            return [min(room, whole[0]) if widths is words else widths[0], *widths[1:]], padding
    return words, 0


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `1 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def printable(text: str) -> str:
    """The text without terminal control characters: names from files and the hub are printed as they are spelled."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
