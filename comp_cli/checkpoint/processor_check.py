"""Image processors and tokenizers against the model that they are for, before a picture is made of what they ask for."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from ..errors import CompError, RefusedError, first_line
from ..families import Family
from ..files.store import read_json
from ..topology import Pixels
from .folder_check import PROCESSORS, leaves, shown

CLASSES = ("processor_class", "image_processor_type", "feature_extractor_type", "tokenizer_class")
LARGEST_SIDE = 4096  # pixels that a picture may be resized to on its way to the model's own size
MOST_PIXELS = LARGEST_SIDE**2
SHORTEST_TEXT = 4  # tokens: start, end, and something between
ENDLESS = 2**31  # transformers writes 1e30 where a tokenizer has no limit


def check_code(folder: Path) -> None:
    """Raises RefusedError where a processor file names code of the folder's own (auto_map) and no class of transformers that
    does as well: a stand-in would read pictures and texts otherwise than the author meant."""
    for path in (folder / name for name in PROCESSORS):
        waiting: list[Any] = [read_json(path)] if path.is_file() else []
        while waiting:
            part = waiting.pop()
            if isinstance(part, list):
                waiting += part
            if not isinstance(part, dict):
                continue
            waiting += part.values()
            if not part.get("auto_map"):
                continue
            named = [part[name] for name in CLASSES if part.get(name) is not None]
            known = named and all(isinstance(name, str) and hasattr(transformers, name) for name in named)
            if not known:
                said = f"{path}: asks for code of its own (auto_map), and comp runs none but its own."
                hint = "Save the processor again with classes of transformers, and without auto_map."
                raise RefusedError(said, hint=hint)


def check_processor(processor: Any, config: dict[str, Any], family: Family, folder: Path) -> None:
    """Raises RefusedError where what a processor makes cannot be what the model takes. `config` is the whole config.json,
    defaults filled in."""
    topology = family.topology
    images, tokenizer = topology.parts_of(processor)
    if images is not None:
        check_numbers(images, folder)
        check_pixels(images, topology.pixels_of(family, config), folder)
    if tokenizer is not None:
        text = topology.text_section(family, config)
        check_texts(tokenizer, text["vocab_size"], folder)
        if topology.padded_by_tokenizer and topology.padding == "longest" and tokenizer.padding_side != "right":
            hint = 'The model counts places from the first token. Set "padding_side": "right" in tokenizer_config.json.'
            raise _refused(folder, f"the tokenizer pads texts on the {tokenizer.padding_side}", hint)
        if topology.reads_the_end(family):
            check_end(tokenizer, text["eos_token_id"], folder)
    for place, (token, words) in topology.text_marks(family, config).items():
        if not (type(token) is int and 0 <= token < words):
            said = f"config.json: {place} is {shown(token)}; expected a token from 0 to {words - 1}"
            raise _refused(folder, said)


def check_numbers(images: Any, folder: Path) -> None:
    """Raises RefusedError where an image processor has a size, or a number that pixels are normalised with, that cannot be."""
    if not hasattr(images, "image_mean"):
        raise _refused(
            folder, "the processor makes no pictures", "preprocessor_config.json or processor_config.json is needed."
        )
    for place, value in leaves(images.to_dict()):
        is_side = place.startswith(("size", "crop_size", "pad_size")) and "pixels" not in place and value is not None
        if (is_side and not (type(value) is int and 1 <= value <= LARGEST_SIDE)) or (
            type(value) is int and value > MOST_PIXELS
        ):
            said = f"the image processor's {place} is {shown(value)}; expected 1 to {LARGEST_SIDE} pixels"
            raise _refused(folder, said)
    for name, least in (("image_mean", -math.inf), ("image_std", 0.0), ("rescale_factor", 0.0)):
        value = getattr(images, name, None)
        for number in value if isinstance(value, list | tuple) else [value]:
            good = number is None or (type(number) in (int, float) and math.isfinite(number) and number > least)
            if not good:
                raise _refused(
                    folder, f"the image processor's {name} is {shown(value)}; expected finite numbers above {least:g}"
                )


def check_pixels(images: Any, taken: Pixels, folder: Path) -> None:
    """Raises RefusedError unless pictures become finite numbers in the shape that the model takes."""
    try:
        found = images(images=[Image.new("RGB", (48, 32), (1, 128, 255))], return_tensors="pt")
        made = found["pixel_values"]
    except Exception as error:
        raise _refused(folder, f"the image processor fails on a plain picture ({shown(first_line(error))})") from error
    if not taken.fit(found):
        said = f"the image processor makes {tuple(made.shape[1:])} of 48 x 32 pixels, the model takes {taken.words}"
        raise _refused(folder, said)
    if not torch.isfinite(made).all():
        raise _refused(folder, "the image processor makes values of a plain picture that are not finite")


def check_texts(tokenizer: Any, vocabulary: int, folder: Path) -> None:
    """Raises RefusedError where a tokenizer has words that the model does not know, or a length that is none."""
    if not hasattr(tokenizer, "model_max_length"):
        raise _refused(folder, "the processor makes no tokens", "The tokenizer files are needed.")
    length = tokenizer.model_max_length
    good = type(length) in (int, float) and length >= SHORTEST_TEXT and (length >= ENDLESS or length == int(length))
    if not good:
        raise _refused(folder, f"the tokenizer's model_max_length is {shown(length)}; expected {SHORTEST_TEXT} tokens or more")
    tokens = len(tokenizer)
    if tokens > vocabulary:
        raise _refused(folder, f"the tokenizer has {tokens} tokens, the model {vocabulary}")


def check_end(tokenizer: Any, end: Any, folder: Path) -> None:
    """Raises RefusedError where texts do not end with the token that the model reads them at: it would read all of them at
    their first one. end: `eos_token_id` of the config; 2 stands for the highest id of a text (as in modeling_comp)."""
    ids = tokenizer(["a"])["input_ids"][0]
    if end != 2 and end not in ids[1:]:
        said = f"the tokenizer makes {ids} of 'a', which has no end: config.json says eos_token_id {shown(end)}"
        raise _refused(folder, said, "The model reads a text at its end. Take the tokenizer and config.json of one model.")


def _refused(folder: Path, said: str, hint: str = "config.json, weights and processor files must fit.") -> CompError:
    return RefusedError(f"{folder}: {said}.", hint=hint)
