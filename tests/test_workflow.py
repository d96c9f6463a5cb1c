"""The workflow that docs/ci.md shows: its steps run in a shell, in their order, as a runner of GitHub runs them."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import onnx
import tiny
import yaml

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "docs" / "workflows"
SMALL = {
    "ratio = 0.5": 'ratio = 0.05\nmethod = "wanda"\nnum-samples = 4\nbatch-size = 4',
    "eval-samples = 256": "eval-samples = 4",
}
SMALL |= {"[1, 8]": "1\niterations = 3\nduration = 0.1", '["torch", "onnx"]': '"torch"'}


def on_path(folder: Path, **programs: str) -> str:
    folder.mkdir()
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "ci.md").read_text()
    for name, language in (("compress.yml", "yaml"), ("comp.toml", "toml")):
        assert f"```{language}\n{(PLACE / name).read_text()}```" in page
        assert f"](workflows/{name})" in page


def test_every_step_runs(tmp_path):
    """Twice: the second run has a benchmark to compare with."""
    tiny.write("clip", tmp_path / "my-clip")
    (tmp_path / "pairs").mkdir()
    tiny.table(tmp_path / "pairs", caption=lambda n: f"a b c {n}")
    recipe = (PLACE / "comp.toml").read_text()
    for usual, small in SMALL.items():
        assert usual in recipe
        recipe = recipe.replace(usual, small)
    (tmp_path / "comp.toml").write_text(recipe)
    path = on_path(tmp_path / "bin", comp=f'exec "{sys.executable}" -P -m comp_cli "$@"', pip="echo pip was asked: $*")
    (job,) = yaml.safe_load((PLACE / "compress.yml").read_text())["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    environment |= {name: str(tmp_path / name) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    said = ""
    for number, script in [*enumerate(steps), (len(steps), steps[-1])]:
        done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 3) if number == len(steps) else done.returncode == 0, (script, done.stdout, done.stderr)
        assert (done.returncode == 3) == ("::error title=comp compare%3A a gate was not met" in done.stdout)
        said += done.stdout
    assert "pip was asked: install -c vendor/comp/constraints.txt ./vendor/comp" in said
    assert onnx.load(tmp_path / "served" / "model.onnx").graph.node and (tmp_path / "compact" / "config.json").exists()
    assert (
        json.loads((tmp_path / "last.json").read_text())["timings"]
        == json.loads((tmp_path / "bench.json").read_text())["timings"]
    )
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    for title in (
        "### my-clip at ratio",
        "### Parity with PyTorch",
        "### Speed-up of the compact model",
        "### last.json -> bench.json",
    ):
        assert title in summary
    outputs = (tmp_path / "GITHUB_OUTPUT").read_text().splitlines()
    assert "compact" in outputs and "served" in outputs and any(line.startswith("ratio<<") for line in outputs)
