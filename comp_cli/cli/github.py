"""What a GitHub workflow reads: annotations among the lines of its log, the summary of a step, values for later steps.

https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

import os
import re
import secrets
from collections.abc import Mapping

MESSAGE = {"%": "%25", "\r": "%0D", "\n": "%0A"}
PROPERTY = MESSAGE | {":": "%3A", ",": "%2C"}
SUMMARY, OUTPUTS = "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"  # variables with names of files


def annotation(kind: str, title: str, message: str) -> str:
    """The line that GitHub shows as an "error" or a "warning"."""
    return f"::{kind} title={_escaped(title, PROPERTY)}::{_escaped(message, MESSAGE)}"


def _escaped(text: str, table: Mapping[str, str]) -> str:
    return "".join(table.get(letter, letter) for letter in text)


def harmless(text: str) -> str:
    """The text, of which no line is a command: what stands in names and data goes into the log as well."""
    return re.sub(r"^(\s*):(?=:)|##(?=\[)", lambda found: f"{found[0]}\u200b", text, flags=re.MULTILINE)


def append_summary(text: str) -> None:
    """Add Markdown to the summary of the step. Raises OSError where that cannot be written."""
    if place := os.environ.get(SUMMARY):
        with open(place, "a", encoding="utf-8") as file:
            file.write(text)


def set_outputs(values: Mapping[str, str]) -> None:
    """Hand values to later steps, as `steps.ID.outputs.NAME`. Raises OSError where that cannot be written."""
    if place := os.environ.get(OUTPUTS):
        end = f"end-{secrets.token_hex(8)}"  # which no value holds
        with open(place, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}<<{end}\n{value}\n{end}\n" for name, value in values.items())
