"""Results as GitHub-flavoured Markdown, for step summaries, issues and pull requests."""

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"[\\`*\[\]<|~]|(?<!\w)_|_(?!\w)|^[>#+]")  # an underscore between letters means nothing


def escaped(text: str) -> str:
    """The text as Markdown shows it unchanged, in one line."""
    return SPECIAL.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table, whose first column is text and whose others are numbers."""
    ruler = [":---", *["---:"] * (len(columns) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (map(escaped, columns), ruler, *(map(escaped, row) for row in rows))]
    return "\n".join([f"### {escaped(title)}", "", *lines, ""])


def paragraph(text: str) -> str:
    """A line of a result. One that begins as a list does stays an item of one."""
    item = "- " * text.startswith("- ")
    return f"{item}{escaped(text.removeprefix('- '))}\n"


def alert(kind: str, text: str) -> str:
    """A box that GitHub draws: "WARNING" or "CAUTION". Lines stay lines."""
    quoted = (f"> {escaped(line)}" for line in text.splitlines())
    return "\n".join([f"> [!{kind}]", "\\\n".join(quoted), ""])
