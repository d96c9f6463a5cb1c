"""README.md and docs/ against what they speak of: links, commands, figures."""

import ast
import inspect
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
import typer
import yaml

import comp_cli
from comp_cli.cli.app import app

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "scripts/README.md", "benchmarks/README.md")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))}
RESULTS = ROOT / "benchmarks" / "results"


def anchors(page: str) -> set[str]:
    """Of the headings, as Markdown makes them: lower case, hyphens, no other signs."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line in a block of code, or cell in `marks`, that calls comp or a file of this repository."""
    found = []
    for name, page in PAGES.items():
        blocks = re.findall(r"```(?:yaml|sh)?\n(.*?)```", page, re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in lines + re.findall(r"`([^`\n]+)`", page):
            line = line.strip().removeprefix("- run: ")
            if re.match(r"(comp|python \w+/|accelerate launch) ?\S", line):
                found.append((name, shlex.split(line, comments=True)))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_local_links_lead_to_files_and_headings(name):
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", PAGES[name]):
        path = (ROOT / name).parent.joinpath(target).resolve() if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_every_command_of_the_pages_takes_the_options_that_they_show():
    groups = typer.main.get_command(app).commands
    seen = set()
    for page, words in commands():
        if words[0] == "accelerate":
            words = words[words.index("comp_cli") :]
        elif words[0] != "comp" or not words[1].isalpha():
            continue
        assert words[1] in groups, f"{page}: {words}"
        known = {option for parameter in groups[words[1]].params for option in (*parameter.opts, *parameter.secondary_opts)}
        shown = {word for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert shown <= known | {"--help"}, f"{page}: {' '.join(words)}: {shown - known}"
        seen.add(words[1])
    assert seen >= {"analyze", "prune", "export", "bench", "env", "upgrade"}


def test_every_script_of_the_pages_exists_with_the_options_that_they_show():
    scripts = [(page, words) for page, words in commands() if words[0] == "python" and not words[1].startswith("-")]
    assert {words[1] for _, words in scripts} >= {"benchmarks/accuracy.py", "benchmarks/latency.py", "scripts/train_clip.py"}
    for page, words in scripts:
        code = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in code for word in words[2:] if word.startswith("--")), f"{page}: {words}"


def test_every_target_of_make_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, page in PAGES.items():
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page, re.MULTILINE)) <= targets, name


def rows(page: str) -> dict[str, list[set[str]]]:
    """First cell of the rows of all tables -> what their other cells say, each without the number of seeds behind it."""
    found = defaultdict(list)
    for line in re.findall(r"^\| (.+) \|$", page, re.MULTILINE):
        first, *others = (re.sub(r" \(\d\)$", "", cell.strip()) for cell in line.split(" | "))
        found[first].append({cell for cell in others if re.search(r"\d", cell)})
    return found


@pytest.mark.parametrize(
    "name, result, begin",
    [
        ("docs/methods.md", "accuracy.md", "Training-free"),
        ("docs/methods.md", "accuracy_clip.md", "Training-free"),
        ("docs/methods.md", "fused_token.md", "Dense"),
        ("docs/performance.md", "latency.md", "FLOPs fall"),
        ("docs/performance.md", "profile.md", "Ratio 0.85"),
        ("docs/performance.md", "peers.md", "| |"),
    ],
)
def test_figures_of_the_pages_are_those_of_the_results(name, result, begin):
    """What both have a row for, the page shows as the benchmark wrote it (behind the line that begins so)."""
    shown, measured = rows(PAGES[name]), rows((RESULTS / result).read_text().split(begin)[1])
    both = (shown.keys() & measured.keys()) - {"method"}
    assert len(both) >= 3
    for first in both:
        for cells in measured[first]:
            assert any(cells <= row for row in shown[first]), f"{first}: {cells}"


def test_the_site_lists_every_page():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", str(settings["nav"])))
    assert listed >= {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_site_is_built_strictly():
    """mkdocs counts the warnings that it shows: --quiet leaves none to --strict."""
    recipe = re.search(r"^\t(.*mkdocs build.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert "--strict" in recipe and not {"-q", "--quiet"} & set(recipe)


def test_files_and_folders_that_the_pages_name_exist():
    for name, page in PAGES.items():
        if name != "CHANGELOG.md":
            paths = re.findall(r"`((?:comp_cli|tests|scripts|benchmarks|docs)/[\w./-]*)`", page)
            assert not [path for path in paths if not (ROOT / path).exists()], name


def test_the_tree_in_readme_names_every_folder_of_the_package():
    tree = re.search(r"```\ncomp_cli/.*?\n(.*?)^tests/", PAGES["README.md"], re.DOTALL | re.MULTILINE)[1]
    named = {folder for line in tree.splitlines() for folder in re.findall(r"(\w+)/", line[:24])}
    assert named == {path.name for path in (ROOT / "comp_cli").iterdir() if path.is_dir() and path.name != "__pycache__"}


def test_the_citation_is_of_the_version_that_the_changes_begin_with():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f"\n## {cited['version']}\n" in PAGES["CHANGELOG.md"].split("\n### ")[0]
    assert cited["version"] == comp_cli.__version__
    assert cited["license"] == "Apache-2.0" and cited["references"][0]["title"]


def calls() -> list[tuple[str, str, ast.Call]]:
    """(page, name, call) of every `comp_cli.name(...)` in the Python of the pages."""
    found = []
    for page, text in PAGES.items():
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("comp_cli."):
                    found.append((page, node.func.attr, node))
    return found


def test_every_call_of_the_pages_fits_its_signature():
    assert {name for _, name, _ in calls()} >= {"prune", "export", "load", "load_onnx"}
    for page, name, call in calls():
        keywords = {keyword.arg: None for keyword in call.keywords}
        try:
            inspect.signature(getattr(comp_cli, name)).bind(*call.args, **keywords)
        except TypeError as error:
            pytest.fail(f"{page}: {ast.unparse(call)}: {error}")


def test_the_api_page_has_everything_that_the_package_gives():
    listed = {name.split(".")[-1] for name in re.findall(r"^::: comp_cli\.([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)}
    reports = {name for name in comp_cli.__all__ if name.endswith("Report")}  # with the module of each
    assert {"analyze", "prune", "export", "bench"} <= listed
    assert listed >= set(comp_cli.__all__) - reports


def test_the_pages_link_the_schema_of_every_command():
    schemas = {path.name for path in (ROOT / "docs" / "schema").glob("*.json")}
    assert schemas == set(re.findall(r"\]\(schema/(\w+\.json)\)", PAGES["docs/ci.md"]))
