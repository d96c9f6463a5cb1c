"""docs/trust.md: every promise names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))


def promises() -> list[tuple[str, list[str]]]:
    """Each row of the tables: the promise, and the tests that it names."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "docs" / "trust.md").read_text(), re.MULTILINE)
    return [(promise, re.findall(r"`(test_\w+)`", tests)) for promise, tests in rows if promise != "promise"]


def test_every_promise_names_tests_that_exist():
    assert len(promises()) >= 40
    defined = set(re.findall(r"^def (test_\w+)\(", TESTS, re.MULTILINE))
    for promise, tests in promises():
        assert tests, f"no test: {promise}"
        assert not set(tests) - defined, f"{promise}: {set(tests) - defined}"
