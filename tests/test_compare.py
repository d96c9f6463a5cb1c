"""`comp compare`: what is a regression, what is noise, and what cannot be compared."""

import copy
import json

import pytest
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app

MACHINE = {
    "device": "cpu",
    "name": "a processor",
    "threads": 1,
    "tf32": False,
    "torch": "2.13",
    "transformers": "5.23",
    "onnxruntime": "1.31",
}
SIZES = {"dense": 1000, "compact": 500}
OLD_TIMING = {"backend": "torch", "side": "dense", "batch": 1, "median": 1.0}  # without low and high


def latency(side, median, spread=0.01, batch=1):
    row = {"backend": "torch", "side": side, "batch": batch, "runs": 10, "median": median, "p90": median, "p99": median}
    return row | {"pairs_per_second": 1000 / median, "low": median * (1 - spread), "high": median * (1 + spread)}


def document(dense=20.0, compact=10.0, spread=0.01, **changes):
    """As `comp bench --save` writes it, of one backend and batch."""
    factor = {"value": dense / compact, "low": dense / compact * 0.99, "high": dense / compact * 1.01}
    return {
        "schema_version": 1,
        "comp_version": "0.6.0",
        "compact": "compact",
        "baseline": "org/model",
        "architecture": "CLIPModel",
        "machine": MACHINE,
        "text_tokens": 35,
        "params": SIZES,
        "flops": SIZES,
        "size_bytes": SIZES,
        "providers": {},
        "peak_memory_bytes": [{"backend": "torch", "side": "compact", "batch": 1, "bytes": 2**20, "baseline_bytes": 2**18}],
        "flops_reduction": 2.0,
        "timings": [latency("dense", dense, spread), latency("own_dense", dense, spread), latency("compact", compact, spread)],
        "speedups": [
            {
                "backend": "torch",
                "batch": 1,
                "speedup": factor,
                "by_kernels": factor,
                "by_pruning": factor,
                "flops_efficiency": 1.0,
            }
        ],
        "gates": [],
        "warnings": [],
    } | changes


@pytest.fixture
def compare(tmp_path):
    """Both documents written and compared; the exit code and the document."""

    def run(before, after, *words):
        paths = [tmp_path / "before.json", tmp_path / "after.json"]
        for path, content in zip(paths, (before, after), strict=True):
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                path.write_text(json.dumps(content))
        result = CliRunner().invoke(app, ["compare", *map(str, paths), "--json", *words])
        assert "Traceback" not in result.output
        return result.exit_code, json.loads(result.stdout)

    return run


def test_ratios_and_intervals_are_those_of_a_calculation_by_hand(compare):
    code, found = compare(document(compact=10.0), document(compact=12.0, spread=0.02))
    (row,) = [row for row in found["changes"] if row["side"] == "compact"]
    assert code == 0 and (row["before"], row["after"], row["verdict"]) == (10.0, 12.0, "slower")
    assert row["ratio"] == pytest.approx({"value": 1.2, "low": 12 * 0.98 / (10 * 1.01), "high": 12 * 1.02 / (10 * 0.99)})
    (faster,) = found["speedups"]
    assert faster["ratio"]["value"] == pytest.approx(10 / 12) and faster["ratio"]["low"] < faster["ratio"]["value"]
    assert found["gates"] == [] and found["params"] == {"before": 500, "after": 500}


REGRESSIONS = {  # after, limit -> exit code, found
    "slower than is allowed": ({"compact": 12.0}, "5", 3, 20.0),
    "as much as is allowed": ({"compact": 12.0}, "21", 0, 20.0),
    "a little": ({"compact": 10.4}, "5", 0, 4.0),
    "none is allowed": ({"compact": 10.4}, "0", 3, 4.0),
    "inside of the intervals": ({"compact": 10.9, "spread": 0.1}, "5", 0, 0.0),
    "faster": ({"compact": 8.0}, "0", 0, 0.0),
    "the same": ({}, "0", 0, 0.0),
}


@pytest.mark.parametrize("case", REGRESSIONS)
def test_what_is_a_regression(case, compare):
    after, limit, expected, found = REGRESSIONS[case]
    code, report = compare(document(), document(**after), "--max-regression", limit)
    (gate,) = report["gates"]
    assert code == expected and gate["passed"] == (expected == 0) and gate["found"] == pytest.approx(found)
    assert ("error" in report) == (expected == 3)
    if expected:
        assert f"takes {found:.1f} % longer" in report["error"]["message"]


def test_a_busy_machine_is_named(compare):
    """The stock model is the same in both: where it takes longer too, it is not the compact one alone."""
    code, found = compare(document(), document(dense=24.0, compact=12.0), "--max-regression", "5")
    assert code == 3 and found["drift"][0]["side"] == "dense" and "1.20 times as long" in found["warnings"][0]
    assert "machine or a library" in found["error"]["hint"]
    assert compare(document(), document(dense=20.4, compact=10.2))[1]["drift"] == []


def test_intervals_that_are_too_wide_to_judge_are_named(compare):
    code, found = compare(document(spread=0.2), document(spread=0.2), "--max-regression", "5")
    assert code == 0 and "too wide to see 5 %" in found["warnings"][0]


def test_versions_that_changed_are_shown(compare):
    code, found = compare(document(), document(machine=MACHINE | {"torch": "2.14"}))
    assert code == 0 and found["versions"] == {"torch": ["2.13", "2.14"]}


APART = {
    "another machine": ({"machine": MACHINE | {"name": "another"}}, "the machine is a processor in"),
    "another device": ({"machine": MACHINE | {"device": "cuda:0"}}, "the device is cpu"),
    "other threads": ({"machine": MACHINE | {"threads": 2}}, "CPU threads are 1"),
    "another model": ({"baseline": "org/other"}, "the dense model is org/model"),
    "another class": ({"architecture": "BlipModel"}, "the architecture is CLIPModel"),
    "a model of the same name": ({"params": SIZES | {"dense": 999}}, "parameters of the dense model are 1000"),
    "another length": ({"text_tokens": 12}, "text tokens are 35"),
    "another batch": (
        {"timings": [latency(side, 5.0, batch=8) for side in ("dense", "own_dense", "compact")]},
        "torch at batch",
    ),
    "a row less": ({"timings": document()["timings"][:2]}, "torch at batch 1 (compact) is in"),
}


@pytest.mark.parametrize("case", APART)
def test_what_is_not_comparable_is_refused(case, compare):
    changes, sentence = APART[case]
    for pair in ((document(), document(**changes)), (document(**changes), document())):
        code, found = compare(*pair)
        assert code == 4 and found["error"]["message"].startswith("not comparable: ")
    assert sentence in compare(document(), document(**changes))[1]["error"]["message"]


def without(key):
    found = document()
    del found[key]
    return found


def changed(*path, to):
    found = copy.deepcopy(document())
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return found


HOSTILE = {
    "another version of the schema": (changed("schema_version", to=2), "schema_version 2: expected 1"),
    "a version that is true": (changed("schema_version", to=True), "schema_version True"),
    "no version": (without("schema_version"), "schema_version None"),
    "cut off": (json.dumps(document())[:-200].encode(), "not valid JSON"),
    "no JSON": (b"\xff\xfe", "not valid JSON"),
    "a list": ([1, 2], "expected a JSON object"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "of another command": ({"schema_version": 1, "graphs": {}}, "no benchmark of comp"),
    "of a failure": ({"schema_version": 1, "error": {"code": 5, "message": "no GPU."}}, "the benchmark failed (no GPU.)"),
    "no times": (changed("timings", to=[]), "holds no times"),
    "times that are text": (changed("timings", to="many"), "timings: expected a list, found str"),
    "a median that is text": (changed("timings", 0, "median", to="5"), "timings[0].median: expected a number, found str"),
    "a median that is true": (changed("timings", 0, "median", to=True), "timings[0].median: expected a number"),
    "a median of nothing": (changed("timings", 0, "median", to=0), "a median of 0"),
    "a median below zero": (changed("timings", 0, "low", to=-1.0), "a median of"),
    "a median without end": (changed("timings", 0, "median", to=float("inf")), "timings[0].median: expected a number"),
    "no number": (changed("timings", 2, "low", to=float("nan")), "timings[2].low: expected a number"),
    "an interval upside down": (changed("timings", 0, "low", to=99.0), "a median of"),
    "a machine that is a text": (changed("machine", to="here"), "machine: expected an object"),
    "no machine": (without("machine"), "the document has no 'machine'"),
    "threads of a half": (changed("machine", "threads", to=0.5), "machine.threads: expected a whole number"),
    "an old one": (changed("timings", to=[OLD_TIMING]), "before version 0.6"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_benchmark_is_refused(case, first, compare):
    content, sentence = HOSTILE[case]
    code, found = compare(*((content, document()) if first else (document(), content)))
    assert code == 4 and sentence in found["error"]["message"]


def test_files_that_are_not_there(compare, tmp_path):
    code, found = compare(document(), None)
    assert code == 2 and "no such file" in found["error"]["message"]
    (tmp_path / "after.json").mkdir()
    assert compare(document(), None)[0] == 4
    assert CliRunner().invoke(app, ["compare", "a.json"]).exit_code == 2


def test_what_newer_versions_add_is_passed_over(compare):
    code, found = compare(document(), document(of_the_future={"a": 1}))
    assert code == 0 and all(row["verdict"] == "alike" for row in found["changes"])


def test_the_library_compares_too(tmp_path):
    for name, content in (("a", document()), ("b", document(compact=12.0))):
        (tmp_path / name).write_text(json.dumps(content))
    report = comp_cli.compare(tmp_path / "a", str(tmp_path / "b"))
    assert isinstance(report, comp_cli.CompareReport) and [row.verdict for row in report.changes] == [
        "alike",
        "alike",
        "slower",
    ]
    with pytest.raises(comp_cli.GateError) as missed:
        comp_cli.compare(tmp_path / "a", tmp_path / "b", max_regression=5)
    assert missed.value.report.gates[0].found == pytest.approx(20) and missed.value.exit_code == 3
    with pytest.raises(comp_cli.UsageError, match="--max-regression -1"):
        comp_cli.compare(tmp_path / "a", tmp_path / "b", max_regression=-1)


# comp bench --save ---------------------------------------------------------------------------------------------------

SHORT = ["--backend", "torch", "--batch", "1", "--iterations", "3", "--duration", "0", "--device", "cpu", "--text-tokens", "12"]


def test_what_a_benchmark_saves_is_its_document_and_can_be_compared(compact_folder, tiny_folder, tmp_path):
    saved = tmp_path / "bench.json"
    words = ["bench", str(compact_folder), "--baseline", str(tiny_folder), *SHORT, "--save", str(saved), "--json"]
    result = CliRunner().invoke(app, [*words, "--max-latency-ms", "0.0001"])
    document = json.loads(result.stdout)
    assert result.exit_code == 3 and document.pop("error")["code"] == 3
    assert json.loads(saved.read_text()) == document and [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert all(row["low"] <= row["median"] <= row["high"] for row in document["timings"])
    report = comp_cli.compare(saved, saved)
    assert [row.ratio.value for row in report.changes] == [1.0] * 3
    assert {row.verdict for row in report.changes} == {"alike"}


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (b"mine", "bench.json", "exists, and is no benchmark of comp"),
        (b'{"graphs": 1}', "bench.json", "exists, and is no benchmark of comp"),
        (None, "no/such/bench.json", "no such folder"),
        (None, ".", "is no file"),
    ],
)
def test_a_file_that_cannot_be_saved_is_refused_before_any_work(content, name, sentence, compact_folder, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = CliRunner().invoke(app, ["bench", str(compact_folder), *SHORT, "--save", str(path), "--json"])
    assert result.exit_code == 2 and sentence in json.loads(result.stdout)["error"]["message"]
    assert content is None or path.read_bytes() == content
