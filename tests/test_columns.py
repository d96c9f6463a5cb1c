"""80 columns hold: every table of every command, and every help."""

import io
import re
import sys

import pytest
import tiny
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.cli.output import Output
from comp_cli.report import (
    analyze_tables,
    bench_tables,
    export_tables,
    prune_tables,
    sweep_tables,
    token_tables,
)
from comp_cli.report.base import Sizes, Threads
from comp_cli.report.bench import BenchReport, Factor, Latency, Machine, PeakMemory, Providers, ProviderShare, Speedup

FEW = {"num_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
MIB = 2**20


class Recording(Output):
    """Remembers the headers of its tables."""

    def __init__(self):
        super().__init__()
        self.headers = []

    def table(self, title, columns, rows):
        self.headers += [word for column in columns for word in column.split()]
        super().table(title, columns, rows)


@pytest.fixture
def printed(monkeypatch):
    """What a function prints on a terminal of 80 columns, checked."""
    monkeypatch.setenv("COLUMNS", "80")

    def check(show, *given):
        results = io.StringIO()
        monkeypatch.setattr(sys, "stdout", results)
        out = Recording()
        show(given[0], out, *given[1:])
        lines = results.getvalue().splitlines()
        assert not [line for line in lines if len(line.rstrip()) > 80 and not line.startswith("Next: ")]
        words = set(re.split(r"[\s│┃]+", results.getvalue()))
        assert not set(out.headers) - words  # none of them is broken, and none is cut
        assert "…" not in results.getvalue()
        return results.getvalue()

    return check


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny.write("llava", tmp_path_factory.mktemp("llava") / "tiny-llava")


def measured(backends, batches, times):
    """A benchmark of large numbers."""

    def factor(value):
        return Factor(value, value * 0.93, value * 1.07)

    sides = ("dense", "own_dense", "compact")
    every = [(backend, batch) for batch in batches for backend in backends]
    return BenchReport(
        comp_version="1",
        compact="/home/somebody/models/of-a-long-name/clip-vit-large-patch14-336-comp-0.5",
        baseline="openai/clip-vit-large-patch14-336",
        architecture="CLIPModel",
        machine=Machine("cpu", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", 2, False, "2.13.0", "5.23.0", "1.31.1"),
        text_tokens=35,
        params=Sizes(428 * 10**6, 214 * 10**6),
        flops=Sizes(160 * 10**9, 80 * 10**9),
        size_bytes=Sizes(1700 * MIB, 850 * MIB),
        providers={side: Providers("CPUExecutionProvider", False, {"CPUExecutionProvider": ProviderShare(9, 1, 1)})
                   for side in sides},
        peak_memory_bytes=tuple(PeakMemory(backend, side, 128, 9000 * MIB, 340 * MIB)
                                for backend in ("torch", "onnx") for side in sides),
        flops_reduction=2.0,
        timings=tuple(Latency(backend, side, batch, 10, times, 1.1 * times, 1.2 * times, 1234.5, times, 1.1 * times)
                      for backend, batch in every for side in sides),
        speedups=tuple(Speedup(backend, batch, factor(12.34), factor(1.2), factor(10.2), 0.85, factor(23.45))
                       for backend, batch in every),
        gates=(),
        threads=Threads(2, "model size"),
    )  # fmt: skip


def test_benchmarks(printed):
    said = printed(bench_tables.print_benchmark, measured(("torch", "onnx", "compile"), (1, 8, 128), 12345.6))
    for words in ("ONNX Runtime, batch 128", "12.34x", "11.48 - 13.20", "2 threads (model size)", "8,660.0 MiB"):
        assert words in said


def test_pruning_and_sweeps(printed, tiny_folder):
    few = FEW | {"method": "magnitude", "dry_run": True}
    printed(prune_tables.print_pruned, comp_cli.prune(tiny_folder, ratio=0.3, **few))
    printed(sweep_tables.print_sweep, comp_cli.prune(tiny_folder, ratio=[0.2, 0.3], **few))


def test_what_was_pruned(printed, tiny_folder, tmp_path):
    report = comp_cli.prune(tiny_folder, ratio=[0.2, 0.3], output=tmp_path / "sweep", method="magnitude", eval_samples=8, **FEW)
    assert "ratio-0.3" in printed(sweep_tables.print_sweep, report)


def test_analyses(printed, tiny_folder, decoder):
    some = {name: FEW[name] for name in ("num_samples", "batch_size", "text_tokens")}
    printed(analyze_tables.print_analysis, comp_cli.analyze(tiny_folder, **some), "tiny", [])
    printed(analyze_tables.print_analysis, comp_cli.analyze(decoder), "tiny", [])


def test_image_tokens(printed, decoder):
    report = comp_cli.prune(decoder, method="pyramiddrop", tokens=18, dry_run=True)
    printed(lambda found, out: token_tables.print_tokens_pruned(found, found.image_tokens, out), report)


def test_exports(printed, compact_folder, tmp_path):
    printed(export_tables.print_export, comp_cli.export(compact_folder, output=tmp_path / "onnx"))


@pytest.mark.parametrize("command", ["", *(found.callback.__name__ for found in app.registered_commands)])
def test_helps(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
