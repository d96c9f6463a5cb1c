"""Code for the README.md of what comp writes: from a picture and texts to a score or a text, with nothing left to fill in.

Graphs are run with ONNX Runtime, NumPy, Pillow and tokenizers alone, so what their processor does is written out; compact
checkpoints with transformers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, SiglipTokenizer

from ..data.preparation import NotKnownError, preparation_of
from ..families import Family
from ..tasks import Task
from ..topology.card_examples import PICTURE

UPRIGHT = 'image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # upright, without alpha'

PROCESSOR = "from transformers import {}"
PACKAGES = {  # -> how the line begins that imports it
    "huggingface_hub": "from huggingface_hub",
    "numpy": "import numpy",
    "pillow": "from PIL",
    "sentencepiece": "import sentencepiece",
    "tokenizers": "from tokenizers",
    "transformers": "from transformers",
}

RUN = """
sessions = {{name: onnxruntime.InferenceSession(f"{{folder}}/{{name}}.onnx") for name in {names}}}

def run(name, values):
    \"""Outputs of a graph by name, from values by name.\"""
    session = sessions[name]
    made = session.run(None, {{value.name: values[value.name] for value in session.get_inputs()}})
    return dict(zip((value.name for value in session.get_outputs()), made))
"""

TOKENIZERS = """
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")  # which cuts and pads as the model needs it

def tokens(texts):
    \"""input_ids and attention_mask, (texts, tokens) each.\"""
    found = tokenizer.encode_batch(texts)
    ids, mask = (np.array([getattr(text, part) for text in found]) for part in ("ids", "attention_mask"))
    return {"input_ids": ids, "attention_mask": mask}
"""

SENTENCEPIECE = """
words = sentencepiece.SentencePieceProcessor(model_file=f"{{folder}}/{file}")

def tokens(texts):
    \"""input_ids (texts, {longest}): lower case, no punctuation, the end behind the words and then padding.\"""
    rows = []
    for text in texts:
        plain = {lower}.translate(str.maketrans("", "", string.punctuation))
        ids = words.encode(" ".join(plain.split()))[:{last}] + [{end}]
        rows.append(ids + [{pad}] * ({longest} - len(ids)))
    return {{"input_ids": np.array(rows)}}
"""


def block(*parts: str) -> str:
    """Python code in Markdown."""
    return "```python\n" + "\n".join(part.strip("\n") + "\n" for part in parts) + "```"


def places(hub_id: str | None, *, images: bool, graphs: bool = False) -> tuple[str, str]:
    """What to import, and the lines that say where model and picture are: in the folder of the card, or on the hub. graphs:
    whether files are opened, which have to be here for it."""
    if hub_id is None:
        own = f'folder, picture = ".", "{PICTURE}"  # this folder, and a picture of yours'
        return "", own if images else 'folder = "."  # this folder'
    if graphs:
        lines = [f'folder = snapshot_download("{hub_id}")', *[f'picture = f"{{folder}}/{PICTURE}"  # or one of yours'] * images]
        return "from huggingface_hub import snapshot_download", "\n".join(lines)
    lines = [f'folder = "{hub_id}"', *[f'picture = hf_hub_download(folder, "{PICTURE}")  # or one of yours'] * images]
    return "from huggingface_hub import hf_hub_download" * images, "\n".join(lines)


# Graphs ---------------------------------------------------------------------------------------------------------------


def for_graphs(
    document: dict[str, Any],
    generation: GenerationConfig | None,
    family: Family,
    task: Task,
    processor: Any,
    folder: Path,
    longest: int,
    hub_id: str | None = None,
) -> str:
    """The code for exported graphs; `generation` says how texts begin and end, where any are written. Pictures or texts that
    are prepared in a way that is not written out here go through transformers' processor. longest: tokens of a text
    that the model takes."""
    images, tokenizer = family.topology.parts_of(processor)
    reads, spell = ([], "") if tokenizer is None else tokens_of(tokenizer, folder, longest) or by_tokenizer(family, longest)
    pixels = "" if images is None else picture_itself() if document["with_preprocessing"] else pixels_of(images)
    if pixels is None:
        reads, pixels = [*reads, PROCESSOR], by_processor(family.topology.processor_class)
    names = [Path(name).stem for name in document["graphs"]]
    first = sorted(line for line in reads if line.startswith("import"))
    later = [line.format(family.topology.processor_class) for line in reads if line.startswith("from")]
    fetch, where = places(hub_id, images=images is not None, graphs=True)
    imports = [
        *first,
        "import numpy as np",
        "import onnxruntime",
        *([fetch] if fetch else []),
        *(["from PIL import Image, ImageOps"] if images else []),
        *later,
    ]
    spell, ending = family.topology.tokens_code(spell), family.topology.graph_code(document, task, generation, processor)
    return block("\n".join(imports), where, RUN.format(names=json.dumps(names)), *filter(None, (spell, pixels)), ending)


def pixels_of(processor: Any) -> str | None:
    """A function that prepares a picture as an image processor of transformers does; None for steps that it does not know."""
    try:
        steps = preparation_of(processor)
    except NotKnownError:
        return None
    height, width = steps.shape
    lines, how = [UPRIGHT], f"Image.Resampling.{steps.filter.name}"
    if edge := steps.edge:
        lines.append(f"size = [int({edge} * side / min(image.size)) for side in image.size]  # {edge} on the shorter side")
        lines.append(f"image = image.resize(size, {how})")
    elif steps.size:
        lines.append(f"image = image.resize({steps.size[::-1]}, {how})")
    if steps.crop:
        lines.append(f"left, top = (image.width - {width}) // 2, (image.height - {height}) // 2")
        lines.append(f"image = image.crop((left, top, left + {width}, top + {height}))  # the middle")
    lines.append("values = np.asarray(image, np.float32)" + (f" * {steps.factor!r}" if steps.factor is not None else ""))
    if steps.mean is not None and steps.std is not None:
        lines.append(f"values = (values - {list(steps.mean)}) / {list(steps.std)}")
    lines.append("return values.astype(np.float32).transpose(2, 0, 1)[None]")
    return function(f"What the model sees of a picture: (1, 3, {height}, {width}).", lines)


def picture_itself() -> str:
    """A function that reads a picture, for graphs that prepare it."""
    about = "A picture as it is, (1, height, width, 3): the graph resizes, crops and normalises it."
    return function(about, [UPRIGHT, "return np.asarray(image)[None]"])


def by_processor(reader: str) -> str:
    """A function that prepares a picture with the processor of transformers. reader: what it is loaded with."""
    lines = [UPRIGHT, 'return images(images=image, return_tensors="np")["pixel_values"]']
    opened = f'processor = {reader}.from_pretrained(folder)\nimages = getattr(processor, "image_processor", processor)\n\n'
    return opened + function("What the model sees of a picture.", lines)


def function(about: str, lines: Sequence[str]) -> str:
    """Code of `pixels`."""
    return "def pixels(path):\n" + "\n".join(f"    {line}" for line in (f'"""{about}"""', *lines))


def tokens_of(tokenizer: Any, folder: Path, longest: int) -> tuple[list[str], str] | None:
    """What to import, and a function from texts to tokens: with tokenizers, or with sentencepiece for SigLIP's tokenizer, which
    transformers has of that kind only; None for others."""
    if (folder / "tokenizer.json").is_file():
        return ["from tokenizers import Tokenizer"], TOKENIZERS
    if not isinstance(tokenizer, SiglipTokenizer):
        return None
    sizes = {"longest": longest, "last": longest - 1, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    lower = "text.lower()" if getattr(tokenizer, "do_lower_case", False) else "text"
    code = SENTENCEPIECE.format(file=next(folder.glob("*.model")).name, lower=lower, **sizes)
    return ["import string", "import sentencepiece"], code


def by_tokenizer(family: Family, longest: int) -> tuple[list[str], str]:
    """The same with transformers."""
    padded = family.topology.padding_code(longest).replace('"pt"', '"np"')
    code = f"""
tokenizer = {family.topology.processor_class}.from_pretrained(folder)
tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

def tokens(texts):
    \"""input_ids and attention_mask, (texts, tokens) each.\"""
    return dict(tokenizer(texts, {padded}))
"""
    return [PROCESSOR], code


# Checkpoints ----------------------------------------------------------------------------------------------------------


def for_checkpoint(family: Family, task: Task, longest: int, *, facts: Mapping[str, float], hub_id: str | None = None) -> str:
    """The code for a compact checkpoint, with transformers and without comp. longest: tokens that texts are padded to where the
    model wants all of one length; facts: see `Topology.facts`."""
    if family.topology.drops_in == "decoder":
        return for_decoder(family, task, hub_id=hub_id)
    images, kind = family.topology.reads_images, family.topology.processor_class
    imports = ["import torch", f"from transformers import AutoModel, {kind}"]
    imports += ["from transformers.image_utils import load_image"] if images else []
    imports[1:1] = ["from PIL import ImageOps"] if images and not family.topology.reads_texts else []
    fetch, where = places(hub_id, images=images)
    imports[1:1] = [fetch] if fetch else []
    opened = (
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()  # runs modeling_comp.py\n"
        f"processor = {kind}.from_pretrained(folder)"
    )
    return block("\n".join(imports), where, opened, family.topology.checkpoint_code(task, longest, facts))


def for_decoder(family: Family, task: Task, *, remote: bool = True, hub_id: str | None = None) -> str:
    """The code for a compact decoder that reads images, with transformers and without comp. remote: whether code lies beside
    the weights."""
    fetch, where = places(hub_id, images=True)
    imports = ["from transformers import AutoModelForImageTextToText, AutoProcessor"]
    imports = [*([fetch] if fetch else []), *imports, "from transformers.image_utils import load_image"]
    trusts = ", trust_remote_code=True" * remote
    opened = (
        f'model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"{trusts}).eval()\n'
        "processor = AutoProcessor.from_pretrained(folder)"
    )
    return block("\n".join(imports), where, opened, family.topology.checkpoint_code(task, 0, {}))


def for_generate(code: str, hub_id: str | None = None) -> str:
    """The code that writes a text with comp and exported graphs."""
    fetch, where = places(hub_id, images=True)
    imports = ["import comp_cli", *([fetch] if fetch else []), "from transformers import AutoProcessor"]
    return block("\n".join([*imports, "from transformers.image_utils import load_image"]), where, code)
