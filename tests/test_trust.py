"""docs/trust.md: every promise names tests that exist, and no local link of the documents leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = "\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))
DOCUMENTS = ["README.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_local_links_lead_to_files(name):
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", link)]
    assert not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
