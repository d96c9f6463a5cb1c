"""README.md of what comp writes: compact checkpoints, and graphs."""

import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..checkpoint.runtimes import FILES, runtime_of
from ..families import Family
from ..options import LAYOUTS
from ..runtime.modeling_comp import TESTED
from ..tasks import Task
from . import card_code
from .card_head import card, graphs_metadata, metadata
from .numbers import gflops, millions, percent
from .prune_tables import in_words, metric_value

LEAST_TRANSFORMERS = TESTED[0]  # as in pyproject.toml
WITHOUT = "Without it transformers stops at `ignore_mismatched_sizes`: give `trust_remote_code=True`, nothing else cures it."
FLAGS = {"batch_size": "train-batch-size"}  # of training, where its name is not that of the option


def model_card(
    document: dict[str, Any],
    family: Family,
    task: Task,
    source: Path,
    *,
    longest: int,
    facts: Mapping[str, float],
    stock: bool = False,
) -> str:
    """README.md of a compact checkpoint. source: the folder of the dense model; longest: tokens of a text where all are padded
    to one length; facts: see `Topology.facts`; stock: whether the class is a stock one."""
    base = document["base_model"]
    head = metadata(document, source)
    license, hub_id = head.license, document["options"].get("push_to_hub")
    lines = [
        f"# {base}, compact at ratio {document['ratio']:.2f}",
        "",
        f"{document['architecture']} for {task.name}, made by comp {document['comp_version']}: attention heads, feed-forward "
        f"channels{'' if stock else ' and tokens'} are removed for real. Parameters {millions(document['params']['dense'])} -> "
        f"{millions(document['params']['compact'])}, FLOPs {gflops(document['flops']['dense'])} -> "
        f"{gflops(document['flops']['compact'])} for one sample{_at_own_texts(document)}.",
        "",
        "```",
        document["command"],
        "```",
        "",
        *quality_lines(document["quality"]),
        "## Use",
        "",
        *(_use_of_stock(family, task, hub_id) if stock else _use(family, task, longest, facts, hub_id)),
        "",
        "`comp_cli.load(folder)` loads the same and checks it, and needs no remote code. `comp_report.json` holds the plan "
        "with every kept head and channel, the measurements, and hashes of the files.",
        *(["", note] if (note := family.topology.note) else []),
        *(["", f"Its license is that of {base}: {license or 'see there'}."] if license or "/" in base else []),
        "",
    ]
    return card(head, lines)


def _use(family: Family, task: Task, longest: int, facts: Mapping[str, float], hub_id: str | None) -> list[str]:
    """How a checkpoint is used whose layers are of unequal sizes."""
    module, *others = FILES[family.topology.runtime]
    lies = f"`{module}`{' and the other `.py` files' if others else ''}, which {'lie' if others else 'lies'} beside the weights"
    least = runtime_of(family).TESTED[0]
    return [
        f"With transformers {least} or newer. `trust_remote_code` runs {lies}: the stock classes cannot express "
        f"layers of unequal sizes. {WITHOUT}",
        "",
        card_code.for_checkpoint(family, task, longest, facts=facts, hub_id=hub_id),
    ]


def _use_of_stock(family: Family, task: Task, hub_id: str | None) -> list[str]:
    """How a checkpoint is used whose layers are alike."""
    return [
        f"With transformers {LEAST_TRANSFORMERS} or newer, and with whatever else reads this class from config.json: "
        "all layers of a tower are of one size, and no code lies beside the weights.",
        "",
        card_code.for_decoder(family, task, remote=False, hub_id=hub_id),
    ]


def _at_own_texts(document: dict[str, Any]) -> str:
    """At which input, and what it is at texts as long as the user's, as far as they are of another length."""
    reference, own = document["reference"]["tokens"], document.get("at_own_texts")
    if own is None:
        return ""
    flops = " -> ".join(gflops(own["flops"][side]) for side in ("dense", "compact"))
    mean = f"{in_words(own['tokens'], but=reference)}, the mean of the {own['purpose']} pairs"
    return f" ({in_words(reference)}); at {mean}, {flops}, ratio {own['ratio']:.2f}"


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """What was lost, on which data."""
    rows = [
        [name, *(metric_value(name, value[side]) for side in ("dense", "compact"))]
        for name, value in (quality["metrics"] or {}).items()
    ]
    rows.append(["prediction agreement with the dense model", "-", percent(quality["agreement"])])
    table = ["| | dense | compact |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return [f"On {quality['samples']} samples that pruning did not see ({quality['data']}):", "", *table, ""]


def prune_command(options: Any, **more: Any) -> str:
    """The command line of `comp prune` that was typed: model, ratio, and every option that is not at its default. Of a local
    path the name only: whoever reads it has other folders. `more`: options that are no part of `PruneOptions`."""
    options = without_places(options)
    parts = ["comp prune", shlex.quote(options.model), *([] if options.ratio is None else [f"--ratio {options.ratio}"])]
    for name, value in (*_changed(options), *((name, value) for name, value in more.items() if value not in (None, False))):
        if name in ("model", "ratio"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, tuple):
            value = ",".join(value)
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(parts)


def without_places(options: Any) -> Any:
    """The same options of `comp prune` with local paths as names only."""
    data = options.data if options.data.data is None else replace(options.data, data=_name(options.data.data))
    return replace(options, model=_name(options.model), data=data)


def _changed(options: Any) -> list[tuple[str, Any]]:
    """Names and values of the fields that are not at their defaults, those of nested options among them."""
    found = []
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            found += [(FLAGS.get(name, name), changed) for name, changed in _changed(value)]
        elif value != field.default:
            found.append((field.name, value))
    return found


def _name(value: str) -> str:
    """A local path without the folders around it."""
    return Path(value).absolute().name if Path(value).expanduser().exists() else value


def graphs_card(
    document: dict[str, Any],
    generation: GenerationConfig | None,
    family: Family,
    task: Task,
    processor: Any,
    folder: Path,
    longest: int,
    source: Path,
    hub_id: str | None = None,
) -> str:
    """README.md of exported graphs; `generation` says how texts begin and end, where they write any. folder: where the files of
    the processor lie; longest: tokens of a text that the model takes; source: the folder of the compact checkpoint; hub_id: of
    the repository that the graphs will lie in."""

    def listed(values: dict[str, Any]) -> str:
        cache = [name for name in values if name.startswith(("past_key_values.", "present."))]
        parts = [f"`{name}` ({', '.join(map(str, value['shape']))})" for name, value in values.items() if name not in cache]
        return ", ".join(parts + [f"`{cache[0]}` and {len(cache) - 1} more" for _ in cache[:1]])

    own = document["layout"] == LAYOUTS[0]  # or of a client that has code for everything
    code = card_code.for_graphs(document, generation, family, task, processor, folder, longest, hub_id) if own else None
    script = family.topology.client_code(document, task, generation, processor, hub_id)
    lines = [
        f"# {document['source'].get('base_model', 'model')} as ONNX",
        "",
        *(f"- `{name}`: {listed(g['inputs'])} to {listed(g['outputs'])}" for name, g in document["graphs"].items()),
        "",
        f"Opset {document['opset']}, for ONNX Runtime {document['min_onnxruntime']} or newer. Token pruning is inside the "
        "graph; batch and text length are free. `export.json` holds versions, kept tokens, errors against PyTorch, hashes.",
        "",
    ]
    if note := family.topology.graphs_note(document):
        lines += [note, ""]
    if code:
        packages = [name for name, line in card_code.PACKAGES.items() if f"\n{line}" in code]
        install = f'pip install "onnxruntime>={document["min_onnxruntime"]}" {" ".join(packages)}'
        without = "torch or comp" if "transformers" in packages else "torch, transformers or comp"
        lines += [f"Without {without}: `{install}`", "", code, ""]
    if script is not None:
        package, said = script
        lines += [f"With node, `npm install {package}`:", "", f"```js\n{said}\n```", ""]
    writes = family.topology.generate_code
    if own and writes and not document["with_preprocessing"]:
        lines += ["With comp, the `generate` of transformers runs the graphs: prompts, beams and sampling.", ""]
        lines += [card_code.for_generate(writes, hub_id), ""]
    return card(graphs_metadata(document, source), lines)
