"""README.md of a decoder whose image tokens leave on the way: how it is used, what it saves, what it cannot do."""

from pathlib import Path
from typing import Any

from ..families import Family
from ..runtime.modeling_comp_vlm import TESTED
from ..tasks import Task
from .card_code import for_decoder
from .card_head import card, metadata
from .cards import quality_lines
from .numbers import change, gflops, mib
from .prune_tables import in_words

LEAST_TRANSFORMERS = TESTED[0]
LIMITS = """## Limits

- What is saved is computation behind the image encoder, and the KV cache. The weights are as large as those of the dense model,
  on the disk and in memory.
- Small details go first. Text in pictures, documents and charts suffer more than questions about scenes: measure on pictures
  of yours, `comp prune ... --data pairs.jsonl`.
- Without remote code no class loads this folder: `text_config.intermediate_size` in config.json is larger than the weights,
  and the runtime puts it right. A stock class would answer as the dense model, without a word."""


def token_card(document: dict[str, Any], family: Family, task: Task, source: Path) -> str:
    """README.md of a folder. source: the folder of the dense model."""
    base, found, options = document["base_model"], document["image_tokens"], document["options"]
    head = metadata(document, source, tags=("comp", "token-pruning"))
    stages = [f"| before layer {one['layer']} | {one['rule']} | {one['kept']} of {one['of']} |" for one in found["stages"]]
    saved = {
        "FLOPs of the prompt": (document["flops"], gflops),
        "FLOPs of a written token": (found["step_flops"], gflops),
        "KV cache behind the prompt": (found["kv_cache_bytes"], mib),
    }
    rows = [
        f"| {name} | {spell(sizes['dense'])} | {spell(sizes['compact'])} | {change(sizes['dense'], sizes['compact'])} |"
        for name, (sizes, spell) in saved.items()
    ]
    quality = document.get("quality")
    ways = {
        "refitted": "its own weights, but for output projections of the language model, which were fitted anew",
        "tuned": "weights that were fine-tuned",
    }
    own = ways.get(found.get("weights"), "its own weights")
    lines = [
        f"# {base}, {found['mean']:.0f} of {found['of']} image tokens",
        "",
        f"{document['architecture']} with {own}, made by comp {document['comp_version']}: image tokens leave its "
        f"language model by the method {options['method']}, {found['mean']:.2f} of {found['of']} are there, mean over layers.",
        "",
        "| stage | rule | image tokens that stay |",
        "|---|---|---|",
        *stages,
        "",
        f"| {in_words(document['reference']['tokens'])} | dense | compact | |",
        "|---|---|---|---|",
        *rows,
        "",
        "```",
        document["command"],
        "```",
        "",
        *(quality_lines(quality) if quality else ["What it costs in quality was not measured.", ""]),
        "## Use",
        "",
        f"With transformers {LEAST_TRANSFORMERS} or newer. `trust_remote_code` runs `modeling_comp_vlm.py` and the other `.py` "
        "files beside the weights.",
        "",
        for_decoder(family, task, hub_id=options.get("push_to_hub")),
        "",
        '`pipeline("image-text-to-text", folder, trust_remote_code=True)` answers the same. So does `comp_cli.load(folder)`, '
        "which checks the folder and needs no remote code. `comp_report.json` holds the numbers, and what the files were.",
        "",
        LIMITS,
        *(["", f"Its license is that of {base}: {head.license or 'see there'}."] if head.license or "/" in base else []),
        "",
    ]
    return card(head, lines)
