"""`--format`: Markdown that GitHub draws as it is meant, annotations that its log understands, and nothing else in between."""

import json
import re
import subprocess
import sys

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from comp_cli.cli import github, markdown
from comp_cli.cli.app import app
from comp_cli.cli.output import Output
from comp_cli.errors import CompError, GateError
from comp_cli.report.base import Report

NASTY = "a|b*c*_d_ [e](f) <g> `h` \\i ~~j~~ snake_case % \r\n::error::k"


def comp(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """The files of a step of a workflow."""
    for name in (github.SUMMARY, github.OUTPUTS):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def rendered(text):
    return MarkdownIt("commonmark").enable("table").enable("strikethrough").render(text)


def decoded(line):
    """An annotation as GitHub reads it: its kind, its title, its message."""
    kind, title, message = re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line).groups()
    for sign, escaped in ((":", "%3A"), (",", "%2C")):
        title = title.replace(escaped, sign)
    plain = [text.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%") for text in (title, message)]
    return kind, *plain


# Pure functions ------------------------------------------------------------------------------------------------------


def test_markdown_shows_every_text_as_it_is():
    shown = rendered(markdown.table(NASTY, ["", NASTY], [[NASTY, "1"], ["x", NASTY]]))
    assert (
        shown.count("<tr>") == 3
        and shown.count("<td") == 4
        and "<em>" not in shown
        and "<a " not in shown
        and "<s>" not in shown
    )
    flat = " ".join(NASTY.split()).replace("<g>", "&lt;g&gt;")
    assert shown.count(flat) == 4 and shown.startswith("<h3>")
    for text in (markdown.paragraph(NASTY), markdown.alert("WARNING", NASTY)):
        assert " ".join(re.sub(r"<[^>]*>", "", rendered(text)).split()).endswith(flat)


def test_annotations_are_escaped_as_github_reads_them():
    line = github.annotation("error", "a: b, c\n%", "100 %\r\nd: e, f")
    assert line == "::error title=a%3A b%2C c%0A%25::100 %25%0D%0Ad: e, f"
    assert decoded(line) == ("error", "a: b, c\n%", "100 %\r\nd: e, f")


@pytest.mark.parametrize("text", ["::error::a", "b\n  ::set-output name=a::b", "##[error]c", "\t::stop-commands::d"])
def test_what_stands_in_names_is_no_command(text):
    safe = github.harmless(text)
    assert not re.search(r"(?m)^\s*::|##\[", safe) and safe.replace("\u200b", "") == text
    assert github.harmless("a::b") == "a::b"


# The sink ------------------------------------------------------------------------------------------------------------


def test_a_step_gets_annotations_a_summary_and_values(runner, capsys):
    Output.command = "comp prune demo"
    out = Output("github")
    out.say("::debug::loading")
    out.warn("few: pairs\n100 %")
    out.table("T", ["", "n"], [["a", 1]])
    out.line("::error::Wrote it.")
    out.result({"ratio": 0.5}, "some\nfolder")
    said = capsys.readouterr()
    commands = [line for line in (said.out + said.err).splitlines() if line.lstrip().startswith("::")]
    assert [decoded(line) for line in commands] == [("warning", "comp prune: warning", "few: pairs\n100 %")]
    summary = (runner / github.SUMMARY).read_text()
    assert "### T" in summary and "| a | 1 |" in summary and "> [!WARNING]\n> few: pairs" in summary and "Wrote it." in summary
    values = (runner / github.OUTPUTS).read_text()
    end = re.match(r"output<<(.+)", values)[1]
    assert values == f"output<<{end}\nsome\nfolder\n{end}\nratio<<{end}\n0.5\n{end}\n"
    out = Output("github")
    out.error(GateError("it falls.", hint="try 0.4", report=Report()))
    assert decoded(capsys.readouterr().out.strip()) == (
        "error",
        "comp prune: a gate was not met (parity, accuracy, speed, memory)",
        "it falls.\ntry 0.4",
    )
    assert (runner / github.SUMMARY).read_text().startswith(summary) and "> [!CAUTION]" in (runner / github.SUMMARY).read_text()


def test_a_summary_that_cannot_be_written_changes_no_result(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(github.SUMMARY, str(tmp_path))
    Output("github").result({})
    assert decoded(capsys.readouterr().out.strip())[0] == "warning"


def test_markdown_goes_to_stdout_and_messages_to_stderr(capsys):
    out = Output("markdown")
    out.say("loading")
    out.warn("few pairs")
    out.table("T", ["", "n"], [["a", 1]])
    out.result({})
    said = capsys.readouterr()
    assert said.out == "### T\n\n|  | n |\n| :--- | ---: |\n| a | 1 |\n\n> [!WARNING]\n> few pairs\n\n"
    assert said.err == "loading\nwarning: few pairs\n"
    Output("markdown").error(CompError("it broke.", hint="mend it"))
    said = capsys.readouterr()
    assert said.out == "> [!CAUTION]\n> it broke.\\\n> mend it\n\n" and said.err == "error: it broke.\nmend it\n"


def test_processes_but_the_first_say_nothing(runner, capsys):
    out = Output("mute")
    out.warn("a")
    out.tell("b")
    out.line("c")
    out.result({"ratio": 1}, "d")
    out.error(CompError("e"))
    assert capsys.readouterr() == ("", "") and not list(runner.iterdir())


# Commands ------------------------------------------------------------------------------------------------------------


def test_every_end_of_a_command_is_annotated(runner, tmp_path):
    ends = {
        ("prune", "demo", "--ratio", "2"): (2, "comp prune: wrong usage", "--ratio 2.0"),
        ("prune", "demo", "--ratoi", "2"): (2, "comp prune: wrong usage", "--ratoi"),
        ("prune", "demo", "--dtype", "fp8"): (2, "comp prune: wrong usage", "'fp8' is not one of"),
        ("compare", "a"): (2, "comp compare: wrong usage", "AFTER"),
        ("compare", tmp_path, tmp_path): (4, "comp compare: input refused (unsafe, corrupt, unsupported)", "cannot be read"),
        ("prunes",): (2, "comp prunes: wrong usage", "prunes"),
    }
    for words, (code, title, message) in ends.items():
        for mode in (["--format", "github"], ["--format=github"]):
            result = comp(*words, *mode)
            (line,) = [line for line in result.stdout.splitlines() if line.startswith("::")]
            kind, said, told = decoded(line)
            assert (result.exit_code, kind, said) == (code, "error", title) and message.lower() in told.lower(), line
    for words, (code, _, message) in ends.items():
        result = comp(*words, "--format", "markdown")
        assert (
            result.exit_code == code
            and result.stdout.startswith("> [!CAUTION]\n> ")
            and message.lower() in result.stdout.lower()
        )


def test_the_environment_in_every_format(runner):
    result = comp("env", "--format", "markdown")
    assert result.exit_code == 0 and "\n\nPython: " in result.stdout
    assert comp("env", "--format", "github").exit_code == 0 and "Python: " in (runner / github.SUMMARY).read_text()
    refused = comp("env", "--format", "github", "--json")
    assert refused.exit_code == 2 and "github and json output at once" in json.loads(refused.stdout)["error"]["message"]


def test_a_signal_is_annotated_as_well():
    code = (
        "import sys; sys.argv = ['comp', 'env', '--format', 'github']\n"
        "from comp_cli.cli import app\nfrom comp_cli.signals import Interrupted\nimport signal\n"
        "app.end_early(Interrupted(signal.SIGTERM))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143 and done.stdout.startswith("::error title=comp env%3A SIGTERM::")


def test_a_closed_stdout_loses_no_words():
    command = f"{sys.executable} -m comp_cli prune demo --ratio 2 --format github >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (1, 2) and ("--ratio 2.0" in done.stderr or "stdout is closed" in done.stderr)
