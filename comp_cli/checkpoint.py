"""A compact checkpoint on disk: what `comp prune` writes, and the proof that it loads."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import modeling_comp
from .cards import model_card
from .data import Batch
from .errors import FAILED, CompError
from .loading import load_model, load_processor, own_state, quiet_libraries, save_processor
from .plan import Plan
from .store import read_tensors_header, save_tensors, sha256
from .workbench import Dense


def write_checkpoint(
    folder: Path, dense: Dense, compact: nn.Module, plan: Plan, document: dict[str, Any], dtype: torch.dtype
) -> None:
    """config.json, weights, runtime, processor files and model card."""
    facts = {key: document[key] for key in ("comp_version", "base_model", "base_revision", "base_address", "task", "ratio")}
    block = plan.comp_block(dense.family, method=document["options"]["method"], **facts)
    auto_map = {"AutoModel": f"{Path(modeling_comp.__file__).stem}.Compact{dense.architecture}"}
    config = dense.config | {"comp": block, "auto_map": auto_map, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in own_state(compact).items()}
    save_tensors(tensors, folder / "model.safetensors")
    shutil.copyfile(modeling_comp.__file__, folder / "modeling_comp.py")
    with quiet_libraries():
        # Afresh: a used tokenizer remembers how it cut texts.
        save_processor(load_processor(dense.source.folder, dense.family.inputs), folder)
    about = {"longest": dense.reference.tokens.get("language", 0), "alone": hasattr(compact, "logit_bias")}
    card = model_card(document, dense.family, dense.task, dense.source.folder, **about)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_report(folder: Path, document: dict[str, Any], plan: Plan) -> None:
    """comp_report.json, last: sizes and hashes of every file, and the plan with all kept indices."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir()) if path.is_file()
    }
    whole = {"schema_version": 1} | document | {"files": files, "plan": plan.to_json()}
    (folder / "comp_report.json").write_text(json.dumps(whole) + "\n")


def check_reload(folder: Path, dense: Dense, compact: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The written folder must load, hold the weights in memory (which its precision can hold), and say what they say."""
    written = load_model(folder, family=dense.family)
    for name, tensor in written.state_dict().items():
        expected = compact.state_dict()[name].to(tensor.dtype).cpu()
        if not torch.equal(tensor, expected):
            raise _differs(f"weight {name} differs")
    weight = next(compact.parameters())
    again = written.to(weight.device, weight.dtype)
    inputs = Batch(inputs, None).to(weight.device, weight.dtype).inputs
    with torch.inference_mode():
        reads = (dense.task.read(model, inputs) for model in (compact, again))
        expected, found = map(dense.task.features, reads)
    if not torch.allclose(expected, found, atol=1e-5):
        raise _differs(f"the features behind its decisions differ by {(expected - found).abs().max():.2e}")


def _differs(how: str) -> CompError:
    hint = "Nothing was kept. Please report this with the command and the model."
    return CompError(f"the written model is not the one in memory: {how}.", code=FAILED, hint=hint)


def own_dtype(dense: Dense) -> torch.dtype:
    """The precision of the checkpoint that a dense model came from: that of most of its tensors."""
    headers = [read_tensors_header(path) for path in dense.source.folder.glob("*.safetensors")]
    names = Counter(header.dtype for file in headers for header in file.values())
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((known[name] for name, _ in names.most_common() if name in known), torch.float32)
