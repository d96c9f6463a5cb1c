"""Code for the README.md of what comp writes: from a picture and texts to a score or a text, with nothing left to fill in.

Graphs are run with ONNX Runtime, NumPy, Pillow and tokenizers alone, so what their processor does is written out; compact
checkpoints with transformers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import GenerationConfig, SiglipTokenizer

from ..families import Family
from ..onnx.graphs import ENCODER, TEXT, VISION
from ..tasks import Task

PICTURE = "scene.png"
TEXTS = ["a small red circle", "two blue squares above a large circle"]
LABELS = ["circle", "square"]
QUESTION = "what color is the circle?"
LONGEST = 20  # tokens of a text that is written

PLACES = f'folder, picture = ".", "{PICTURE}"  # this folder, and a picture of yours'
UPRIGHT = 'image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # upright, without alpha'

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

MATCHING = """
for text, (no, yes) in zip(texts, scores):
    print(f"{1 / (1 + np.exp(no - yes)):6.1%} sure that this matches: {text}")
"""

WRITING = """
written = [{begin}]
made = run("decoder_model", {{"input_ids": np.array([written]), "encoder_hidden_states": states}})
while len(written) < {longest}:
    written.append(int(made["logits"][0, -1].argmax()))
    if written[-1] == {end}:
        break
    past = {{name.replace("present", "past_key_values"): value for name, value in made.items()}}
    made |= run("decoder_with_past_model", past | {{"input_ids": np.array([written[-1:]])}})
print(tokenizer.decode(written))
"""


def block(*parts: str) -> str:
    """Python code in Markdown."""
    return "```python\n" + "\n".join(part.strip("\n") + "\n" for part in parts) + "```"


# Graphs ---------------------------------------------------------------------------------------------------------------


def for_graphs(
    document: dict[str, Any],
    generation: GenerationConfig | None,
    family: Family,
    task: Task,
    processor: Any,
    folder: Path,
    longest: int,
) -> str | None:
    """The code for exported graphs; `generation` says how texts begin and end, where any are written. None where pictures or
    texts are prepared in a way that is not written out here. longest: tokens of a text that the model takes."""
    images, texts = "pixel_values" in family.inputs, "input_ids" in family.inputs
    pixels = pixels_of(getattr(processor, "image_processor", processor)) if images else ""
    spelling = tokens_of(getattr(processor, "tokenizer", processor), folder, longest) if texts else ([], "")
    if pixels is None or spelling is None:
        return None
    reads, spell = spelling
    if family.decoder and family.decoder.question is None:  # it writes, and is asked nothing
        spell = spell.strip("\n").partition("\n")[0]
    names = [Path(name).stem for name in document["graphs"]]
    first = sorted(line for line in reads if line.startswith("import"))
    later = [line for line in reads if line.startswith("from")]
    imports = [
        *first,
        "import numpy as np",
        "import onnxruntime",
        *(["from PIL import Image, ImageOps"] if images else []),
        *later,
    ]
    places = PLACES if images else 'folder = "."  # this folder'
    if generation:
        ending = writing(generation, family)
    else:
        ending = deciding(document, family, task)
    return block("\n".join(imports), places, RUN.format(names=json.dumps(names)), *filter(None, (spell, pixels)), ending)


def pixels_of(processor: Any) -> str | None:
    """A function that prepares a picture as an image processor of transformers does; None for steps that it does not know."""
    size, crop = ({k: v for k, v in dict(getattr(processor, name, None) or {}).items() if v} for name in ("size", "crop_size"))
    resizes, crops, rescales, normalizes, pads = (
        getattr(processor, f"do_{step}", False) for step in ("resize", "center_crop", "rescale", "normalize", "pad")
    )
    resample = getattr(processor, "resample", None)
    filtering = Image.Resampling.BILINEAR if resample is None else resample  # as transformers chooses
    known = [{"height", "width"}, {"shortest_edge"}] if crops else [{"height", "width"}]
    ends = crop if crops else size
    odd = resizes and (size.keys() not in known or not isinstance(filtering, int))
    if odd or pads or ends.keys() != {"height", "width"}:
        return None
    lines, width, height = [UPRIGHT], ends["width"], ends["height"]
    if resizes:
        how = f"Image.Resampling.{Image.Resampling(filtering).name}"
        if edge := size.get("shortest_edge"):
            lines.append(f"size = [int({edge} * side / min(image.size)) for side in image.size]  # {edge} on the shorter side")
            lines.append(f"image = image.resize(size, {how})")
        else:
            lines.append(f"image = image.resize(({size['width']}, {size['height']}), {how})")
    if crops:
        lines.append(f"left, top = (image.width - {width}) // 2, (image.height - {height}) // 2")
        lines.append(f"image = image.crop((left, top, left + {width}, top + {height}))  # the middle")
    lines.append("values = np.asarray(image, np.float32)" + (f" * {processor.rescale_factor!r}" if rescales else ""))
    if normalizes:
        mean, std = (np.ravel(values).tolist() for values in (processor.image_mean, processor.image_std))
        lines.append(f"values = (values - {mean}) / {std}")
    lines.append("return values.astype(np.float32).transpose(2, 0, 1)[None]")
    about = f'"""What the model sees of a picture: (1, 3, {height}, {width})."""'
    return "def pixels(path):\n" + "\n".join(f"    {line}" for line in (about, *lines))


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


def texts_of(task: Task) -> str:
    if task.prompt == "{}":
        return f"texts = {json.dumps(TEXTS)}"
    said = task.prompt.replace("{}", "{label}")
    return f'texts = [f"{said}" for label in {json.dumps(LABELS)}]'


def deciding(document: dict[str, Any], family: Family, task: Task) -> str:
    """From texts and a picture to a decision."""
    texts, split = texts_of(task), VISION in document["graphs"]
    vision, text = Path(VISION).stem, Path(TEXT).stem
    if task.paired_inputs:
        whole = (
            "images = np.repeat(pixels(picture), len(texts), axis=0)  # one for each text\n"
            'scores = run("model", tokens(texts) | {"pixel_values": images})["itm_score"]'
        )
        parts = (
            f'image = run("{vision}", {{"pixel_values": pixels(picture)}})  # once, for any number of texts\n'
            f'scores = run("{text}", tokens(texts) | image)["itm_score"]'
        )
        return f"{texts}\n{parts if split else whole}{MATCHING}"
    if family.encoders:
        return f"{texts}\n{_logits(document, split)}\n{_chances(document)}"
    return alike(task, "model")


def _logits(document: dict[str, Any], split: bool) -> str:
    """Lines that end with `logits`, a number for each text."""
    if not split:
        return 'logits = run("model", tokens(texts) | {"pixel_values": pixels(picture)})["logits_per_image"][0]'
    bias = f" + {document['logit_bias']!r}" if "logit_bias" in document else ""
    return (
        f'image = run("{Path(VISION).stem}", {{"pixel_values": pixels(picture)}})["image_embeds"]\n'
        f'words = run("{Path(TEXT).stem}", tokens(texts))["text_embeds"]\n'
        "image, words = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (image, words))\n"
        f"logits = {document['logit_scale']!r} * (words @ image[0]){bias}"
    )


def _chances(document: dict[str, Any]) -> str:
    if "logit_bias" in document:  # trained so: every text is a question of its own
        made = "chances = 1 / (1 + np.exp(-logits))  # of each text by itself"
    else:
        made = "chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()  # among these texts"
    return made + '\nfor text, chance in zip(texts, chances):\n    print(f"{chance:6.1%} {text}")'


def alike(task: Task, name: str) -> str:
    """What one encoder alone is for: how near two things are."""
    output = task.outputs[0]
    if output == "image_embeds":
        made = [
            "values = pixels(picture)",
            "both = np.concatenate([values, values[..., ::-1]])  # the picture and its mirror image, or another one",
            f'first, second = run("{name}", {{"pixel_values": both}})["{output}"]',
        ]
    else:
        made = [f"texts = {json.dumps(TEXTS)}", f'first, second = run("{name}", tokens(texts))["{output}"]']
    cosine = "cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)"
    return "\n".join([*made, cosine, 'print(f"{cosine:.3f} alike (1: the same)")'])


def writing(generation: GenerationConfig, family: Family) -> str:
    """Greedy, with the cache."""
    ids = {"begin": generation.decoder_start_token_id, "end": generation.eos_token_id, "longest": LONGEST}
    given = '{"pixel_values": pixels(picture)}'
    if family.decoder.question:
        given = f'tokens(["{QUESTION}"]) | {given}'
    return f'states = run("{Path(ENCODER).stem}", {given})["last_hidden_state"]{WRITING.format(**ids)}'


# Checkpoints ----------------------------------------------------------------------------------------------------------


def for_checkpoint(family: Family, task: Task, longest: int, *, alone: bool) -> str:
    """The code for a compact checkpoint, with transformers and without comp. longest: tokens that texts are padded to where the
    model wants all of one length; alone: whether each text is judged by itself."""
    images, texts = "pixel_values" in family.inputs, "input_ids" in family.inputs
    kind = "AutoProcessor" if images and texts else "AutoImageProcessor" if images else "AutoTokenizer"
    imports = ["import torch", f"from transformers import AutoModel, {kind}"]
    imports += ["from transformers.image_utils import load_image"] if images else []
    imports[1:1] = ["from PIL import ImageOps"] if images and not texts else []
    places = PLACES if images else 'folder = "."  # this folder'
    opened = (
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()  # runs modeling_comp.py\n"
        f"processor = {kind}.from_pretrained(folder)"
    )
    return block("\n".join(imports), places, opened, _asked(family, task, longest, alone))


def for_writer(family: Family) -> str:
    """The code that writes a text with comp and exported graphs."""
    question = f', text="{QUESTION}"' if family.decoder.question else ""
    imports = "import comp_cli\nfrom transformers import AutoProcessor\nfrom transformers.image_utils import load_image"
    return block(
        imports,
        PLACES,
        "writer, processor = comp_cli.load_onnx(folder), AutoProcessor.from_pretrained(folder)\n"
        f'inputs = processor(images=load_image(picture){question}, return_tensors="pt")\n'
        f"written = writer.generate(**inputs, num_beams=3, max_new_tokens={LONGEST - 1})\n"
        "print(processor.decode(written[0], skip_special_tokens=True))",
    )


def _asked(family: Family, task: Task, longest: int, alone: bool) -> str:
    padded = f'padding="max_length", max_length={longest}' if family.padding == "max_length" else "padding=True"
    given = f'{padded}, truncation=True, return_tensors="pt"'
    if family.decoder:
        question = f', text="{QUESTION}"' if family.decoder.question else ""
        return (
            f'inputs = processor(images=load_image(picture){question}, return_tensors="pt")\n'
            f"written = model.generate(**inputs, max_new_tokens={LONGEST - 1})\n"
            "print(processor.decode(written[0], skip_special_tokens=True))"
        )
    if task.paired_inputs:
        return (
            f"{texts_of(task)}\n"
            f"inputs = processor(images=[load_image(picture)] * len(texts), text=texts, {given})\n"
            "with torch.no_grad():\n    chances = model(**inputs).itm_score.softmax(-1)[:, 1]\n"
            'for text, chance in zip(texts, chances):\n    print(f"{chance:6.1%} sure that this matches: {text}")'
        )
    if family.dual:
        logits = f"model(**inputs, {family.dual.asked}).itm_score.flatten() / {family.dual.temperature}"
    elif family.encoders:
        logits = "model(**inputs).logits_per_image[0]"
    else:
        return _alike(task, given)
    chances = "logits.sigmoid()" if alone else "logits.softmax(-1)"
    return (
        f"{texts_of(task)}\n"
        f"inputs = processor(images=load_image(picture), text=texts, {given})\n"
        f"with torch.no_grad():\n    logits = {logits}\n"
        f'for text, chance in zip(texts, {chances}):\n    print(f"{{chance:6.1%}} {{text}}")'
    )


def _alike(task: Task, given: str) -> str:
    output = task.outputs[0]
    if output == "image_embeds":
        made = (
            "image = load_image(picture)\n"
            "both = [image, ImageOps.mirror(image)]  # or another picture\n"
            'inputs = processor(images=both, return_tensors="pt")'
        )
    else:
        made = f"texts = {json.dumps(TEXTS)}\ninputs = processor(texts, {given})"
    return (
        f"{made}\n"
        f"with torch.no_grad():\n    first, second = model(**inputs).{output}\n"
        'print(f"{torch.cosine_similarity(first, second, dim=0):.3f} alike (1: the same)")'
    )
