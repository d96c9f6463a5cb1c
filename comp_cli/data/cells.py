"""What the cells of a table say: texts, answers, labels. Pure functions; what makes no sense raises BadRow.

A text stays the string that it was. What a reader has made a number or truth value of is written as JSON writes it.
"""

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

MATCHES = {"match", "matched", "matching"}
MISMATCHES = {"mismatch", "mismatched", "unmatched"}
LABELS = dict.fromkeys({*MATCHES, "1", "true", "t", "yes", "y", "positive"}, 1)
LABELS |= dict.fromkeys({*MISMATCHES, "0", "false", "f", "no", "n", "negative"}, 0)
QUOTED = re.compile(r"""[\[{]\s*["'\[{]""")  # how a list of texts or a record begins, and words in brackets do not


class BadRow(ValueError):
    """A row that makes no pair: what is wrong with it, to be counted, and what it holds, to find it by."""

    def __init__(self, problem: str, found: str):
        super().__init__(f"{problem}: {found}")
        self.problem, self.found = problem, found[:80]


class Number(str):
    """A number of a JSON text, as it is written there: 007 is none, but 1.0, 1e-5 and 10**30 stay what they are."""


def record(cells: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record of a JSON text. ValueError for two values of one name: which is meant is not clear."""
    found = dict(cells)
    if len(found) < len(cells):
        raise ValueError("two values of one name")
    return found


VERBATIM: dict[str, Any] = {"parse_int": Number, "parse_float": Number, "parse_constant": lambda name: None}  # NaN: nothing
VERBATIM |= {"object_pairs_hook": record}


def as_text(value: Any) -> str | None:
    """A cell as text, without space around it; None where it holds none. A number that only a NaN in its column has made a
    float is written as the integer that it was. BadRow for half of a surrogate pair, which no tokenizer takes."""
    match value:
        case str():
            text = str(value).strip()
        case bool():
            text = str(value).lower()
        case float() if value != value:
            return None
        case float() if value.is_integer() and abs(value) < 1e15:
            text = str(int(value))
        case int() | float() | Decimal():
            try:
                text = str(value)
            except ValueError as error:  # Python writes no integer of thousands of digits
                raise BadRow("number without end", "an integer") from error
        case date() | time():
            text = value.isoformat()
        case _:
            return None
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow("text that is no Unicode", repr(text)[:60])
    return text or None


def written(text: str) -> Any:
    """The list or record that a text is written as, in JSON or as Python prints it; else the text itself.

    "[1, 2]", "[[0, 0], [4, 4]]" and "[a word]" are texts: an interval, a box, words in brackets. BadRow for what begins like a
    list of texts and is none, such as the arrays that NumPy prints without commas.
    """
    bare = text.strip()
    if re.match(r"\(\s*['\"]", bare) and bare.endswith(")"):
        return printed_tuple(bare) or text
    if bare[:1] + bare[-1:] not in ("[]", "{}"):
        return text
    try:
        found = json.loads(bare, **VERBATIM)
    except (ValueError, RecursionError):
        return printed_list(bare) if QUOTED.match(bare) else text
    if isinstance(found, list) and (held := parts(found)) and all(isinstance(part, Number | bool) for part in held):
        return text
    return found


def printed_list(text: str) -> Any:
    """What Python prints of a list or record, read back without running anything; raises BadRow."""
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        strings = [kind for kind in kinds if kind != tokenize.NL]
        glued = any(a == b == tokenize.STRING for a, b in zip(strings, strings[1:], strict=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, about backslashes
            if not glued and isinstance(found := ast.literal_eval(text), list | tuple | dict):
                return found
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError):
        pass
    raise BadRow("text that begins as a list and is none", text[:60])


def printed_tuple(text: str) -> Any:
    """A tuple of texts as Python prints it; None for what may as well be words in parentheses."""
    try:
        found = printed_list(text)
    except BadRow:
        return None
    return found if all(isinstance(part, str) for part in found) else None


def parts(value: Any) -> list[Any]:
    """What a cell holds: the parts of a list, of lists in it, and of one that is written as a text; else the cell itself."""
    found, left = [], [written(value) if isinstance(value, str) else value]
    while left:
        part = left.pop()
        if isinstance(part, list | tuple):
            left.extend(reversed(part))
        else:
            found.append(part)
    return found


def read_texts(value: Any) -> list[str]:
    """The texts of a cell: one or a list of them."""
    return [text for part in parts(value) if (text := as_text(part))]


def read_answers(value: Any) -> tuple[str, ...]:
    """The answers of a row: a text, or a list of texts or of records that hold one each under "answer", as VQA v2 has them."""
    if isinstance(value, str):
        value = written(value)
    if isinstance(value, Mapping):  # a list of records may come as a record of lists
        value = value.get("answer")
    found = (part.get("answer") if isinstance(part, Mapping) else part for part in parts(value))
    return tuple(text for part in found if (text := as_text(part)))


def read_label(value: Any) -> int | None:
    """1 or 0 for a number, truth value or word that says so; else None."""
    return LABELS.get(shown(value).lower().removesuffix(".0"))


def shown(value: Any) -> str:
    """A cell in a message: what it says, or of which kind it is."""
    try:
        text = as_text(value)
    except BadRow as bad:
        text = bad.found
    return text or ("None" if value is None or isinstance(value, str) else f"a {type(value).__name__}")
