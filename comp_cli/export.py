"""`comp export`: ONNX graphs with the token pruning inside, written only if they say what torch says."""

import json
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__, data, tasks
from .errors import GATE, REFUSED, USAGE, CompError
from .families import find_family
from .loading import facts, load_model, load_processor, quiet_libraries
from .modeling_comp import CompactAttention
from .output import Output
from .report import mib
from .store import atomic_folder, check_output, folder_size, read_config, sha256

INPUTS = ("pixel_values", "input_ids", "attention_mask")
OPSET = 20
TARGETS = ("onnxruntime", "onnx")  # with ONNX Runtime's fused attention node, or with standard operators only
EXTERNAL_DATA_FROM = 1_900_000_000  # bytes; protobuf ends at 2 GiB


class Graph(nn.Module):
    """The model as a graph: tensors in, the task's decision out."""

    def __init__(self, model: nn.Module, task: tasks.Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return getattr(outputs, self.task.output)


@dataclass(frozen=True)
class Parity:
    """Largest and mean difference between torch and ONNX Runtime on one kind of input."""

    batch: int
    text_tokens: int
    inputs: str
    max_error: float
    mean_error: float
    same_decision: float


def export(
    folder: Path, output: Path, out: Output, *, overwrite: bool, atol: float, opset: int = OPSET, target: str = TARGETS[0]
) -> dict[str, Any]:
    """Export a compact (or dense) checkpoint folder; returns the report. Exit 3 above the tolerance, nothing left behind."""
    check_target(target, opset)
    check_output(output, overwrite=overwrite, source=folder)
    started = time.perf_counter()
    config = read_config(folder)
    family, architecture = find_family(config)
    task = tasks.TASKS[family.architectures[architecture]]
    processor = load_processor(folder)
    model = load_model(folder, dtype=torch.float32)
    longest = min(model.config.text_config.max_position_embeddings, 512)
    with atomic_folder(output, overwrite=overwrite) as partial:
        out.say("exporting the graph (this takes a minute for a full-size model) ...")
        path = partial / "model.onnx"
        write_graph(model, task, path, opset=opset, target=target)
        cases = parity_inputs(model, processor, min(35, longest))
        with out.progress("checking parity with torch", len(cases)) as bar:
            session = open_session(path)
            parity = []
            for name, inputs in cases:
                parity.append(compare(model, task, session, name, inputs))
                bar.advance()
        worst = max(parity, key=lambda p: p.max_error)
        if not worst.max_error <= atol:
            raise CompError(
                f"the graph differs from torch by {worst.max_error:.2e} (batch {worst.batch}, {worst.text_tokens} text "
                f"tokens, {worst.inputs} inputs); allowed is {atol:.0e}.",
                code=GATE,
                hint="Nothing was written. --atol sets the tolerance.",
            )
        with quiet_libraries():
            processor.save_pretrained(partial)
        shutil.copyfile(folder / "config.json", partial / "config.json")
        document = {
            "comp_version": __version__,
            "versions": _versions(),
            "source": facts(config),
            "architecture": architecture,
            "opset": opset,
            "target": target,
            "dtype": "float32",
            "inputs": {i.name: list(map(str, i.shape)) for i in session.get_inputs()},
            "outputs": {o.name: list(map(str, o.shape)) for o in session.get_outputs()},
            "keep": {
                t["layout"]["encoder"]: [layer["keep"] for layer in t["layers"]]
                for t in config.get("comp", {}).get("towers", [])
            },
            "atol": atol,
            "parity": [vars(p) for p in parity],
            "size_bytes": folder_size(partial),
            "seconds": round(time.perf_counter() - started, 1),
        }
        (partial / "README.md").write_text(_card(document))
        document["files"] = {p.name: sha256(p) for p in sorted(partial.iterdir()) if p.is_file()}
        (partial / "export.json").write_text(json.dumps({"schema_version": 1} | document, indent=1) + "\n")
    print_export(document, output, out)
    return document


def write_graph(model: nn.Module, task: tasks.Task, path: Path, *, opset: int = OPSET, target: str = TARGETS[0]) -> None:
    """Write one graph with dynamic batch and text length; attention of compact models as one node for "onnxruntime"."""
    for module in model.modules():
        if isinstance(module, CompactAttention):
            module.fused_node = target == TARGETS[0]
    side = model.config.vision_config.image_size
    # Example sizes of 0 and 1 would be baked into the graph; these are none of a model's own sizes.
    tokens = min(7, model.config.text_config.max_position_embeddings)
    example = (torch.zeros(2, 3, side, side), torch.full((2, tokens), 1), torch.ones(2, tokens, dtype=torch.long))
    batch, text = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: batch}, "input_ids": {0: batch, 1: text}, "attention_mask": {0: batch, 1: text}}
    with quiet_libraries(), torch.no_grad():
        program = torch.onnx.export(
            Graph(model, task).eval(),
            example,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[task.output],
            dynamic_shapes=shapes,
            opset_version=opset,
            verbose=False,
        )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(path, external_data=weights > EXTERNAL_DATA_FROM)


def check_target(target: str, opset: int) -> None:
    """Exit 2 for a target or an opset that comp does not write."""
    if target not in TARGETS:
        raise CompError(f"--target {target}: unknown.", code=USAGE, hint=f"Use one of {', '.join(TARGETS)}.")
    if not 18 <= opset <= 23:
        raise CompError(f"--opset {opset}: expected 18 to 23.", code=USAGE)


def open_session(path: Path, device: str = "cpu", threads: int = 0, profile: Path | None = None):
    """An ONNX Runtime session whose first provider is the one that was asked for. Exit 5 where it is another.

    With `profile` the session times its nodes into a file that begins so.
    """
    import onnxruntime

    from .errors import DEVICE

    onnxruntime.set_default_logger_severity(4)
    wanted = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if wanted.startswith("CUDA"):
        preload_cuda()
    number = int(device.partition(":")[2] or 0)
    providers = [wanted] if wanted.startswith("CPU") else [(wanted, {"device_id": number}), "CPUExecutionProvider"]
    with quiet_libraries():
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    first = session.get_providers()[0]
    if first != wanted:
        raise CompError(
            f"ONNX Runtime runs on {first}, not on {wanted}.",
            code=DEVICE,
            hint="Install onnxruntime-gpu and the CUDA and cuDNN libraries it asks for, or use --device cpu.",
        )
    return session


def preload_cuda() -> None:
    """Let ONNX Runtime find the CUDA libraries that pip installed. It prints what it misses on stdout: not ours to say."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):
            onnxruntime.preload_dlls()


def feeds(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def parity_inputs(model: nn.Module, processor, longest: int) -> list[tuple[str, dict[str, Tensor]]]:
    """Real and random inputs: batches 1 to 8, short and long texts, with and without padding."""
    pairs = list(data.scene_pairs("train", 8, labelled=False))
    real = [data.make_batch(part, processor, longest).inputs for part in (pairs[:1], pairs[1:3], pairs)]
    sizes = (1, longest, 0), (3, longest, longest // 2), (2, min(4, longest), 1)
    random = [data.random_inputs(model.config, batch, tokens, padded=padded) for batch, tokens, padded in sizes]
    return [("real", inputs) for inputs in real] + [("random", inputs) for inputs in random]


def compare(model: nn.Module, task: tasks.Task, session, name: str, inputs: dict[str, Tensor]) -> Parity:
    with torch.inference_mode():
        expected = task.logits(model, inputs)
    found = torch.from_numpy(session.run([task.output], feeds(inputs))[0]).float()
    error = (expected - found).abs()
    batch, tokens = inputs["input_ids"].shape
    largest = error.max().item() if torch.isfinite(error).all() else float("inf")
    return Parity(batch, tokens, name, largest, error.mean().item(), tasks.agreement(expected, found))


def resolve_folder(folder: Path | None, out: Output) -> Path:
    """The folder that was named, or the last compact model below the current folder."""
    from .store import find_last

    if folder is None:
        folder = find_last("comp_report.json", Path.cwd())
        if folder is None:
            raise CompError(
                "no folder named, and no compact model below the current folder.",
                code=USAGE,
                hint="Make one with: comp prune demo --ratio 0.5 -o compact",
            )
        out.say(f"taking {folder}")
    if not folder.is_dir():
        raise CompError(f"{folder}: no such folder.", code=USAGE, hint="Name a folder that `comp prune` wrote.")
    if "comp" not in read_config(folder):
        raise CompError(
            f"{folder} is not a compact model.", code=REFUSED, hint=f"Make one with: comp prune {folder} --ratio 0.5"
        )
    return folder.resolve()


def print_export(document: dict[str, Any], output: Path, out: Output) -> None:
    rows = [
        [
            f"{p['inputs']}, batch {p['batch']}, {p['text_tokens']} text tokens",
            f"{p['max_error']:.1e}",
            f"{p['mean_error']:.1e}",
        ]
        for p in document["parity"]
    ]
    out.table(f"Parity with torch (allowed: {document['atol']:.0e})", ["inputs", "max error", "mean error"], rows)
    out.line(f"Wrote {output} ({mib(document['size_bytes'])}, opset {document['opset']}). {document['seconds']:.0f} s.")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
    import onnxruntime

    return found | {"onnxruntime": onnxruntime.__version__}


def _card(document: dict[str, Any]) -> str:
    inputs = ", ".join(f"`{name}` ({', '.join(shape)})" for name, shape in document["inputs"].items())
    outputs = ", ".join(f"`{name}`" for name in document["outputs"])
    return (
        f"# {document['source'].get('base_model', 'model')} as ONNX\n\n"
        f"`model.onnx` (opset {document['opset']}): {inputs} to {outputs}. Token pruning is inside the graph; batch and text "
        "length are free. `export.json` holds versions, kept tokens and the differences from torch.\n"
    )
