"""Arguments of the library and of the command line: their types, lists as text, outputs that nobody named."""

import functools
import inspect
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

from .errors import UsageError
from .options import BACKENDS, Target, TokenOptions, flag
from .progress import Progress

P = ParamSpec("P")
R = TypeVar("R")

EMPTY_IS_NONE = ("label_column", "answer_column", "split_column")  # what '' says of them: there is none
MOST_RATIOS = 20  # of a sweep: each is a folder
POSITIONAL = ("model", "folder", "before", "after")
EXPECTED: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    os.PathLike: "a path",
    Sequence: "a list",
    Progress: "an object with say, warn, track and shows_bars",
    NoneType: "None",
}
NUMBERS: dict[type, type] = {int: Integral, float: Real}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, refusing arguments of types that its annotations do not name: "no" is not False, and None no number.
    It raises UsageError where one is, and where a text is empty or no name can hold it. Numbers of other libraries, such as
    NumPy's, become Python's own, which reports can hold."""
    annotations = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        for name, value in [*zip(annotations, args, strict=False), *keywords.items()]:
            if name in annotations:
                _check_argument(name, value, annotations[name])
        own: Any = {name: _plain(value) for name, value in keywords.items()}
        return function(*map(_plain, args), **own)  # which refuses what it does not know, and misses what it needs

    return call


def _check_argument(name: str, value: object, annotation: Any) -> None:
    about = name.upper() if name in POSITIONAL else flag(name)
    if not fits(value, annotation):
        wanted = " or ".join(EXPECTED[kind] for kind in members(annotation))
        raise UsageError(f"{about} {reprlib.repr(value)}: expected {wanted}.")
    if isinstance(value, str | os.PathLike):
        check_text(about, os.fspath(value), may_be_empty=name in EMPTY_IS_NONE)


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation names, without what they hold."""
    every = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(get_origin(one) or one for one in every)


def fits(value: object, annotation: Any) -> bool:
    """Whether a value is of a type that an annotation names."""
    return any(_is_a(value, kind) for kind in members(annotation))


def expected(annotation: Any) -> str:
    """The types of an annotation in words, for whoever cannot say None."""
    return " or ".join(EXPECTED[kind] for kind in members(annotation) if kind not in (NoneType, os.PathLike))


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool | bytes):  # a bool is no number, though it is an int; bytes are no list
        return kind is type(value)
    return isinstance(value, NUMBERS.get(kind, kind))


def _plain(value: Any) -> Any:
    """A number as Python's own; all else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_text(about: str, text: str, *, may_be_empty: bool) -> None:
    """Raises UsageError where an argument is empty, or is no text that a path or a name can be."""
    if not text and not may_be_empty:
        raise UsageError(f"{about} is empty.")
    if "\0" in text:
        raise UsageError(f"{about} holds a zero byte.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{about} is not valid UTF-8: {text!r}.") from None


UNITS = {"target_speedup": "x", "target_latency_ms": "ms"}


def default_output(
    model: str,
    ratio: float | tuple[float, ...] | None,
    method: str,
    tokens: TokenOptions | None,
    target: Target | None = None,
    plan_only: bool = False,
) -> Path:
    """Where a compact model goes if nobody says: beside nothing of the dense one, in the current folder. plan_only: the file of
    its plan."""
    named = model.split("@")[0] if model.startswith("hf://") else model
    ratios = ratio if isinstance(ratio, tuple) else () if ratio is None else (ratio,)
    amount = "-".join(["comp", *(f"{each:g}" for each in ratios)])
    if tokens is not None:
        often = tokens.tokens if tokens.tokens_share is None else f"{tokens.tokens_share:g}"
        amount = f"{method}-{'stages' if often is None else often}"
    if target is not None:
        amount = f"comp-{'drop-' * (not target.is_least)}{target.amount}{UNITS.get(target.kind, '')}"
    return Path(f"{Path(named).name or 'model'}-{amount}{'.plan.json' * plan_only}".lstrip("-@"))


def parse_backends(given: str | Sequence[str]) -> tuple[str, ...]:
    """Backends as a text with commas, or several texts. Raises UsageError where one is none."""
    parts = given.split(",") if isinstance(given, str) else given
    names = tuple(dict.fromkeys(str(name).strip() for name in parts if str(name).strip()))
    if not names or not set(names) <= set(BACKENDS):
        raise UsageError(f"--backend {_listed(given)}: expected some of {', '.join(BACKENDS)}, with commas.")
    return names


def parse_ratios(given: str | float | Sequence[float] | None) -> float | tuple[float, ...] | None:
    """A ratio as a number or a text, or several as a text with commas or a list; whether each can be, the options say. Raises
    UsageError for what is no number, and for lists that make no sense."""
    if given is None or isinstance(given, int | float):
        return given
    single = isinstance(given, str) and "," not in given
    parts = given.split(",") if isinstance(given, str) else given
    try:
        ratios = tuple(map(_real, parts))
    except (TypeError, ValueError):
        raise UsageError(f"--ratio {_listed(given)}: expected a number, or several with commas, such as 0.3,0.5.") from None
    if single:
        return ratios[0]
    names = [f"{ratio:g}" for ratio in ratios]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UsageError(f"--ratio {_listed(given)}: {twice[0]} is there twice.")
    if not 1 <= len(ratios) <= MOST_RATIOS:
        raise UsageError(f"--ratio: expected up to {MOST_RATIOS} numbers, found {len(ratios)}.")
    return ratios


def parse_modes(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Modes as a text with commas, or several texts; which of them a model has, it says itself. Raises UsageError for none."""
    if given is None:
        return None
    parts = given.split(",") if isinstance(given, str) else given
    names = tuple(dict.fromkeys(str(name).strip() for name in parts if str(name).strip()))
    if not names:
        raise UsageError(f"--modes {_listed(given)}: expected names with commas, such as language_params,image_tokens.")
    return names


def parse_bytes(given: str | int | None, name: str = "max_memory") -> int | None:
    """Bytes as a number, or as a text with a unit: "1GiB", "800MB". Raises UsageError for another."""
    if not isinstance(given, str):
        return given
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?)B|B)?", given.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"{flag(name)} {given!r}: expected bytes, such as 1GiB or 800MB.")
    number, unit, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))


def parse_batches(given: str | int | Sequence[int]) -> tuple[int, ...]:
    """Batch sizes as a text with commas, a number, or several. Raises UsageError where one is none."""
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        sizes = tuple(dict.fromkeys(map(_whole, parts)))
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > 10**5:
        raise UsageError(f"--batch {_listed(given)}: expected numbers from 1 to 100000, with commas, such as 1,8.")
    return sizes


def _real(part: Any) -> float:
    if isinstance(part, str) or _is_a(part, float):
        return float(part)
    raise TypeError("no number")


def _whole(part: Any) -> int:
    if isinstance(part, str) or _is_a(part, int):
        return int(part)
    raise TypeError("no whole number")


def _listed(given: object) -> str:
    return ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
