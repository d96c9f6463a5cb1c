"""A compact checkpoint on disk: what `comp prune` writes, and the proof that it loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from ..checkpoint.loading import load_model, load_processor, quiet_libraries, save_processor, untied_state_dict
from ..checkpoint.places import copy_settings, without_places
from ..checkpoint.precision import as_written, of_the_whole
from ..checkpoint.runtimes import runtime_facts, ship
from ..data.batches import Batch
from ..engine.slicing import padded
from ..errors import CompError
from ..families import Family
from ..files.store import facts, save_tensors
from ..plan import Plan
from ..report.card_pictures import save_example, show_pictures
from ..report.cards import model_card
from ..report.page.pages import prune_page
from .dense import Dense
from .stock import stock_document

PAGE = "report.html"
GENERATION = "generation_config.json"
ORIGIN = ("comp_version", "base_model", "base_revision", "base_address", "task", "ratio")  # of a report, for config.json


def write_checkpoint(
    folder: Path, dense: Dense, compact: nn.Module, plan: Plan, document: dict[str, Any], dtypes: Mapping[str, torch.dtype]
) -> None:
    """config.json, weights, runtime, processor files and model card; of a uniform plan those of a stock class, without runtime.
    dtypes: of every floating-point tensor."""
    state = untied_state_dict(compact)
    save_tensors(as_written(state, dtypes), folder / "model.safetensors")
    write_beside(folder, dense, plan, document, of_the_whole(dtypes, state), dense.family.topology.facts(compact))


def write_beside(
    folder: Path,
    dense: Dense,
    plan: Plan,
    document: dict[str, Any],
    dtype: torch.dtype,
    numbers: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """All of it but the weights. dtype: of the whole; numbers: see `Topology.facts`."""
    stock = document["options"]["uniform"]
    config = stock_document(dense, plan) if stock else _with_block(dense, plan, document)
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(without_places(config), indent=2) + "\n")
    if not stock:
        ship(dense.family, folder)
    with quiet_libraries():
        # Afresh: a used tokenizer remembers how it cut texts.
        save_processor(load_processor(dense.source.folder), folder, dense.source.folder)
    generation = dense.source.folder / GENERATION
    if generation.is_file() and dense.family.topology.drops_in == "decoder":  # whose end of a text nothing else may say
        copy_settings(generation, folder / GENERATION)
    card = model_card(
        document, dense.family, dense.task, dense.source.folder, longest=dense.text_tokens, facts=numbers, stock=stock
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if dense.family.topology.reads_images:
        save_example(folder)


def _with_block(dense: Dense, plan: Plan, document: dict[str, Any]) -> dict[str, Any]:
    """config.json of a class of the runtime."""
    origin = {key: document[key] for key in ORIGIN} | {"method": document["options"]["method"]}
    block = plan.comp_block(dense.family, dense.hf_config.to_dict(), **origin, runtime=runtime_facts(dense.family))
    return dense.config | {"comp": block, "auto_map": auto_map(dense.family, dense.architecture)}


def write_report(
    folder: Path,
    document: dict[str, Any],
    plan: Plan,
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    pictures: Sequence[Any] = (),
) -> None:
    """The report as a page, then comp_report.json, last: sizes and hashes of every file, and the plan with all kept indices.
    known: what is said of files that are not to be read again. pictures: of the samples in the document, PIL images."""
    (folder / PAGE).write_text(prune_page({"schema_version": 1} | document, pictures), encoding="utf-8")
    show_pictures(folder)
    files = {path.name: known.get(path.name) or facts(path) for path in sorted(folder.iterdir()) if path.is_file()}
    whole = {"schema_version": 1} | document | {"files": files, "plan": plan.to_json()}
    (folder / "comp_report.json").write_text(json.dumps(whole) + "\n")


def check_reload(folder: Path, dense: Dense, compact: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The written folder must load, hold exactly the weights in memory (which are rounded already), and say what they say."""
    written = load_model(folder, family=dense.family)
    for name, tensor in written.state_dict().items():
        expected = compact.state_dict()[name].cpu()
        if not torch.equal(tensor.to(expected.dtype), expected):
            raise _differs(f"weight {name} differs")
    weight = next(compact.parameters())
    again = written.to(weight.device, weight.dtype)
    inputs = Batch(inputs, None).to(weight.device, weight.dtype).inputs
    with torch.inference_mode():
        reads = (dense.task.forward(model, inputs) for model in (compact, again))
        expected, found = map(dense.task.features, reads)
    if not torch.allclose(expected, found, atol=1e-5):
        raise _differs(f"the features behind its decisions differ by {(expected - found).abs().max():.2e}")


def _differs(how: str) -> CompError:
    hint = "Nothing was kept. Please report this with the command and the model."
    return CompError(f"the written model is not the one in memory: {how}.", hint=hint)


def told_apart(dense: Dense, model: nn.Module, plan: Plan) -> nn.Module:
    """The compact model with the channels of zeros of its plan, if it has any."""
    if not any(layer.padding for tower in plan.towers for layer in tower.layers):
        return model
    return dense.build(plan, padded(untied_state_dict(model), dense.family, plan))


def auto_map(family: Family, architecture: str) -> dict[str, str]:
    """Which class answers for which of transformers' Auto classes: all of those that know the stock class, and AutoModel."""
    stock = getattr(transformers, architecture)
    known = {"AutoModel"}
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        found = mapping.get(stock.config_class, None) if name.startswith("AutoModel") and mapping is not None else None
        if stock in (found if isinstance(found, tuple | list) else (found,)):
            known.add(name)
    return dict.fromkeys(sorted(known), f"{family.topology.runtime}.Compact{architecture}")
