"""README.md of what comp writes: compact checkpoints, and graphs."""

from typing import Any

from transformers import GenerationConfig

from .families import Family
from .graphs import ENCODER, VISION
from .report import gflops, millions

# How graphs write texts.
WRITING = """
```python
import comp_cli
from transformers import AutoProcessor

model, processor = comp_cli.load_onnx("FOLDER"), AutoProcessor.from_pretrained("FOLDER")
tokens = model.generate(**processor(image, {asked}return_tensors="pt"), num_beams=3)
print(processor.decode(tokens[0], skip_special_tokens=True))
```

With ONNX Runtime alone, greedily; `inputs` is what the processor makes of one image (and its question), as NumPy arrays:

```python
import numpy as np
import onnxruntime

def run(name, values):
    session = sessions[name]
    found = session.run(None, {{value.name: values[value.name] for value in session.get_inputs()}})
    return dict(zip((value.name for value in session.get_outputs()), found))

names = ("encoder_model", "decoder_model", "decoder_with_past_model")
sessions = {{name: onnxruntime.InferenceSession(f"FOLDER/{{name}}.onnx") for name in names}}
tokens = [{begin}]
states = run("encoder_model", inputs)["last_hidden_state"]
made = run("decoder_model", {{"input_ids": np.array([tokens]), "encoder_hidden_states": states}})
while len(tokens) < 20:
    tokens.append(int(made["logits"][0, -1].argmax()))
    if tokens[-1] == {end}:
        break
    past = {{name.replace("present", "past_key_values"): value for name, value in made.items()}}
    made |= run("decoder_with_past_model", past | {{"input_ids": np.array([tokens[-1:]])}})
```
"""


def model_card(document: dict[str, Any], family: Family) -> str:
    """README.md of a compact checkpoint."""
    base, options = document["base_model"], document["options"]
    more = f" --task {options['task']}" if options["task"] else ""
    more += f" --steps {options['training']['steps']}" if options["training"]["steps"] else ""
    lines = [
        "---",
        *([f"base_model: {base}"] if "/" in base else []),
        "library_name: transformers",
        "tags: [comp, pruned, structured-pruning, token-pruning]",
        "---",
        "",
        f"# {base}, compact at ratio {document['ratio']:.2f}",
        "",
        f"Made by comp {document['comp_version']} with `comp prune {options['model']} --ratio {options['ratio']} "
        f"--method {options['method']} --seed {options['seed']}{more}`: attention heads, feed-forward channels and tokens "
        f"are removed for real. Parameters {millions(document['params']['dense'])} -> "
        f"{millions(document['params']['compact'])}, FLOPs {gflops(document['flops']['dense'])} -> "
        f"{gflops(document['flops']['compact'])} per image-text pair.",
        "",
        "```python",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)  # modeling_comp.py lies beside the weights',
        'processor = AutoProcessor.from_pretrained("FOLDER")',
        "```",
        *(["", "`model.generate` writes texts, with a cache, as that of the dense model."] if family.decoder else []),
        "",
        'or `comp_cli.load("FOLDER")`, which needs no remote code. `comp_report.json` holds the plan with every kept head',
        "and channel, the measurements, and hashes of the files.",
        *(["", f"It was pruned for `model(..., {family.dual.asked})`."] if family.dual else []),
        "",
    ]
    return "\n".join(lines)


def graphs_card(document: dict[str, Any], generation: GenerationConfig | None) -> str:
    """README.md of exported graphs; `generation` says how texts begin and end, where they write any."""

    def listed(values: dict[str, Any]) -> str:
        cache = [name for name in values if name.startswith(("past_key_values.", "present."))]
        parts = [f"`{name}` ({', '.join(map(str, value['shape']))})" for name, value in values.items() if name not in cache]
        return ", ".join(parts + [f"`{cache[0]}` and {len(cache) - 1} more" for _ in cache[:1]])

    lines = [f"- `{name}`: {listed(g['inputs'])} to {listed(g['outputs'])}" for name, g in document["graphs"].items()]
    if VISION in document["graphs"]:
        lines.append("\nEncode an image once, and match it against any number of texts: `images` is 1, or as many as texts.")
    if generation:
        asked = "question, " if "input_ids" in document["graphs"][ENCODER]["inputs"] else ""
        ids = {"begin": generation.decoder_start_token_id, "end": generation.eos_token_id}
        lines.append(WRITING.format(asked=asked, **ids))
    return (
        f"# {document['source'].get('base_model', 'model')} as ONNX\n\n" + "\n".join(lines) + "\n\n"
        f"Opset {document['opset']}. Token pruning is inside the graph; batch and text length are free. "
        "`export.json` holds versions, kept tokens and the differences from torch.\n"
    )
