"""What other runtimes make of exported graphs, against ONNX Runtime in Python: largest difference of an output, in units of
its largest number.

    python benchmarks/runtimes.py FOLDER...     folders that `comp export` wrote

OpenVINO runs where it is installed (`pip install openvino`), onnxruntime-node and onnxruntime-web where NODE_PATH holds them
(`npm install --ignore-scripts onnxruntime-node onnxruntime-web`). Inputs are noise of the shapes that export.json says.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

SIZES = {"tokens": 7, "height": 90, "width": 70}  # of axes of free size, by name; any other one is OTHER
OTHER = 2
NODE = """
import * as ort from "%s";
import { readFileSync } from "node:fs";
if (ort.env.wasm) ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(%s)));
const made = { float32: (data) => Float32Array.from(data), uint8: (data) => Uint8Array.from(data),
  int64: (data) => BigInt64Array.from(data, BigInt) };
const feeds = {};
for (const [name, { type, dims, data }] of Object.entries(JSON.parse(readFileSync("inputs.json"))))
  feeds[name] = new ort.Tensor(type, made[type](data), dims);
const found = Object.entries(await session.run(feeds));
console.log(JSON.stringify(Object.fromEntries(found.map(([name, { data }]) => [name, Array.from(data, Number)]))));
"""
Values = dict[str, np.ndarray]


def noise(inputs: dict[str, Any]) -> Values:
    """Values for the inputs of a graph, as export.json describes them."""
    random, made = np.random.default_rng(0), {}
    for name, said in inputs.items():
        shape = [size if isinstance(size, int) else SIZES.get(size, OTHER) for size in said["shape"]]
        if said["type"] == "float":
            made[name] = random.standard_normal(shape).astype(np.float32)
        elif said["type"] == "uint8":
            made[name] = random.integers(0, 256, shape, dtype=np.uint8)
        else:
            made[name] = np.ones(shape, np.int64) if "mask" in name else random.integers(4, 16, shape)
    return made


def in_python(path: Path, given: Values) -> Values:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, given), strict=True))


def in_openvino(path: Path, given: Values) -> Values:
    import openvino

    found = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(given)
    return {name: value for output, value in found.items() for name in output.get_names()}


def in_node(package: str) -> Callable[[Path, Values], Values]:
    def run(path: Path, given: Values) -> Values:
        told = {name: {"type": str(v.dtype), "dims": v.shape, "data": v.ravel().tolist()} for name, v in given.items()}
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "node_modules").symlink_to(os.environ["NODE_PATH"])
            (place / "inputs.json").write_text(json.dumps(told))
            (place / "run.mjs").write_text(NODE % (package, json.dumps(str(path.resolve()))))
            done = subprocess.run(["node", "run.mjs"], cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return {name: np.array(values) for name, values in json.loads(done.stdout).items()}

    return run


def difference(path: Path, given: Values, right: Values, run: Callable[[Path, Values], Values]) -> str:
    try:
        found = run(path, given)
    except Exception as error:
        return f"fails: {str(error).strip().splitlines()[0][:60]}"
    apart = (np.abs(found[name].ravel() - value.ravel()).max() / np.abs(value).max() for name, value in right.items())
    return f"{max(apart):.1e}"


def main() -> None:
    runtimes: dict[str, Callable[[Path, Values], Values]] = {}
    for package in ("onnxruntime-node", "onnxruntime-web"):
        if (Path(os.environ.get("NODE_PATH", "/nowhere")) / package).is_dir():
            runtimes[package] = in_node(package)
    if importlib.util.find_spec("openvino"):
        runtimes["OpenVINO"] = in_openvino
    print("| graph |", " | ".join(runtimes), "|")
    print("|---|" + "---|" * len(runtimes))
    for folder in map(Path, sys.argv[1:]):
        for name, graph in json.loads((folder / "export.json").read_text())["graphs"].items():
            given = noise(graph["inputs"])
            right = in_python(folder / name, given)
            found = [difference(folder / name, given, right, run) for run in runtimes.values()]
            print(f"| `{folder.name}/{name}` |", " | ".join(found), "|", flush=True)


if __name__ == "__main__":
    main()
