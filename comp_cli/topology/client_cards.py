"""Code in the cards of encoders as transformers.js runs them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .card_examples import LABELS, PICTURE, TEXTS

if TYPE_CHECKING:
    from ..tasks import Task

CLIENT = "@huggingface/transformers"
ZERO_SHOT = """
import {{ pipeline }} from "@huggingface/transformers";

const folder = {folder}
const classify = await pipeline("zero-shot-image-classification", folder);
for (const {{ score, label }} of await classify("{picture}", {labels}, {{ hypothesis_template: {template} }}))
  console.log(`${{(100 * score).toFixed(1)}}% ${{label}}`);
"""

IMAGES = """
import {{ AutoImageProcessor, CLIPVisionModelWithProjection, RawImage }} from "@huggingface/transformers";

const folder = {folder}
const processor = await AutoImageProcessor.from_pretrained(folder);
const model = await CLIPVisionModelWithProjection.from_pretrained(folder);
const {{ image_embeds }} = await model(await processor(await RawImage.read("{picture}")));
console.log(image_embeds.dims, image_embeds.normalize().tolist()[0].slice(0, 4));
"""

WORDS = """
import {{ AutoTokenizer, CLIPTextModelWithProjection, cos_sim }} from "@huggingface/transformers";

const folder = {folder}
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await CLIPTextModelWithProjection.from_pretrained(folder);
const {{ text_embeds }} = await model(tokenizer({texts}, {{ padding: true, truncation: true }}));
const [first, second] = text_embeds.tolist();
console.log(cos_sim(first, second).toFixed(3), "alike (1: the same)");
"""

IN_CLIENT = (
    "For transformers.js (4.x) as it is, in node and in browsers: config.json names the precision of the files in `onnx`, so "
    "no `dtype` is needed. That client makes pixels of a picture in its own way (without the smoothing of Pillow where a "
    "picture shrinks), so scores differ from those in Python, most for large pictures: shrink these before. From the same "
    "pixels they are the same."
)


def places(hub_id: str | None) -> dict[str, str]:
    """What code has to say of where model and picture are: in the folder of the card, or on the hub."""
    if hub_id is None:
        return {"folder": '"./"; // this folder', "picture": PICTURE}
    picture = f"https://huggingface.co/{hub_id}/resolve/main/{PICTURE}"
    return {"folder": f'"{hub_id}";', "picture": picture}


def zero_shot(task: Task, hub_id: str | None) -> str:
    """Which of some texts fits a picture."""
    labels, template = (TEXTS, "{}") if task.prompt == "{}" else (LABELS, task.prompt)
    given = {"labels": json.dumps(labels), "template": json.dumps(template)}
    return ZERO_SHOT.format(**places(hub_id), **given).strip("\n")


def of_images(hub_id: str | None) -> str:
    """The embedding of a picture."""
    return IMAGES.format(**places(hub_id)).strip("\n")


def of_texts(hub_id: str | None) -> str:
    """How alike two texts are."""
    return WORDS.format(**places(hub_id), texts=json.dumps(TEXTS)).strip("\n")
