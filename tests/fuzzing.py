"""What all fuzzers share: hostile values, how a document is damaged, and what may come of it.

The suite draws the same inputs every time; `make fuzz` draws ten times as many, others each time.
"""

import contextlib
import copy
import io
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from comp_cli.errors import CompError

COMMON = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("suite", derandomize=True, max_examples=100, **COMMON)
settings.register_profile("long", derandomize=False, max_examples=1000, **COMMON)

SECONDS, KIB = 20, 400_000  # of processor time, and of memory, that one input may take
NAN, INF = float("nan"), float("inf")
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**6, 10**9, 10**30, -(10**9), NAN, INF, -INF, 1e-30]
    ),
    st.sampled_from([0.5, 1e30, -0.0, "", "x", "0", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 300, [], {}, [[]], [{}]]),
    st.integers(-10, 300),
    st.floats(width=32),
    st.text(max_size=8),
    st.lists(st.integers(-3, 300), max_size=3),
    st.dictionaries(st.sampled_from(["a", "towers", "height", "auto_map", "model_type"]), st.integers(-3, 300), max_size=2),
)


def examples(number: int) -> settings:
    """So many inputs in the suite; more in a longer profile."""
    return settings(max_examples=number * settings.default.max_examples // 100)


def places(content: Any) -> list[tuple[Any, ...]]:
    """The path of every value in nested JSON, containers as well."""
    found, waiting = [], [((), content)]
    while waiting:
        path, value = waiting.pop()
        if path:
            found.append(path)
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [((*path, key), part) for key, part in inner]
    return sorted(found, key=repr)


def damaged(content: Any) -> st.SearchStrategy:
    """Copies of a document of which one to three values are replaced or gone."""
    change = st.tuples(st.sampled_from(places(content)), VALUES, st.booleans())
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _changed(content, changes))


def _changed(content: Any, changes: list[tuple[tuple[Any, ...], Any, bool]]) -> Any:
    made = copy.deepcopy(content)
    for path, value, drop in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            part = made
            for key in path[:-1]:
                part = part[key]
            if drop and isinstance(part, dict) and value is None:
                del part[path[-1]]
            else:
                part[path[-1]] = value
    return made


def torn(content: bytes) -> st.SearchStrategy:
    """Copies of a file that are cut, or of which some bytes are others."""
    at = st.integers(0, max(len(content) - 1, 0))
    cut = at.map(lambda end: content[:end])
    flip = st.lists(st.tuples(at, st.integers(0, 255)), min_size=1, max_size=4).map(lambda changes: _flipped(content, changes))
    return st.one_of(cut, flip, st.binary(max_size=200))


def _flipped(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    made = bytearray(content)
    for at, byte in changes:
        made[at] = byte
    return bytes(made)


def write(path: Path, content: Any) -> None:
    """Bytes as they are, else JSON; what JSON cannot say is written as Python does (NaN, lone surrogates)."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
    path.write_bytes(data)


def outcome(do: Callable[[], Any]) -> Any:
    """What a call gives, or the CompError that refuses its input. Anything else fails: another exception, a refusal that calls
    itself a defect, a word on stdout, seconds or MiB that no small input is worth."""
    before, started, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            found = do()
    except CompError as error:
        assert error.exit_code in (1, 2, 3, 4, 5) and error.message and "defect" not in f"{error.message} {error.hint}"
        found = error
    assert said.getvalue() == ""
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIB
    return found


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Nothing new may lie in a folder afterwards."""
    before = sorted(path.name for path in folder.iterdir())
    yield
    assert sorted(path.name for path in folder.iterdir()) == before
