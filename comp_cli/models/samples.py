"""Which tokens of sample images and texts stay, layer by layer: heard in a run of the compact model itself, nothing is ranked
a second time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint.loading import config_of
from ..data.batches import Collator
from ..data.rows import Pair
from ..engine.scoring import tower_layers
from ..families import Family, Stream, Tower
from ..progress import Progress
from ..report.samples import KeptAt, Picture, SampleKept, StreamKept
from ..tasks import Task
from .pairs import generated_pairs

SAMPLES = 4  # that a report shows
ALIKE = 4  # generated pairs one behind the other whose images are nearly the same
SIDE = 336  # pixels of the longest side of a picture in a report
Position = Callable[[int], int | None]  # place of a token in its tower -> which patch or word it is; None for no such


@dataclass
class Heard:
    """What is left of the tokens of one sample in a run. entered: tower -> how many entered it. states: tower -> its
    `TokenState`. stages: of a decoder that image tokens leave, what is left of them before each layer with a stage; tokens: of
    its image."""

    entered: dict[str, int] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    stages: dict[int, KeptAt] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Runs:
    """How samples go through a model. collate: of texts as long as it takes."""

    family: Family
    task: Task
    collate: Collator


def of_scenes(model: nn.Module, runs: Runs, progress: Progress) -> tuple[tuple[SampleKept, ...], tuple[Picture, ...]]:
    """`kept_samples` of generated scenes, each another image: what goes into folders that may be published never shows the
    user's own. Where the model refuses them, which it says itself, there are none."""
    pairs = generated_pairs(runs.task, labelled=False).read("evaluation", SAMPLES * ALIKE)
    try:
        return kept_samples(model, runs, islice(pairs, 0, None, ALIKE))
    except ValueError as error:
        progress.warn(f"no sample shows which tokens stay: {error}")
        return (), ()


def kept_samples(model: nn.Module, runs: Runs, pairs: Iterable[Pair]) -> tuple[tuple[SampleKept, ...], tuple[Picture, ...]]:
    """What each pair's tokens become in a compact model, and its picture, one at a time; nothing where no token leaves."""
    if not drops_tokens(model, runs.family):
        return (), ()
    found = [kept_sample(model, runs, pair) for pair in pairs]
    return tuple(sample for sample, _ in found), tuple(picture for _, picture in found)


def kept_sample(model: nn.Module, runs: Runs, pair: Pair) -> tuple[SampleKept, Picture]:
    """The same of one pair. Raises ValueError where the model refuses it: an image of fewer tokens than are to stay."""
    family, task, collate = runs.family, runs.task, runs.collate
    weight = next(model.parameters())
    seen = collate.seen(pair)
    batch = collate([seen]).to(weight.device, weight.dtype)
    with watching(model, family) as heard, torch.inference_mode():
        said = answer(model, runs, batch.inputs)
    streams = list(encoder_streams(model, runs, heard, batch.inputs))
    if heard.stages:
        streams.append(decoder_stream(model, family, heard, batch.inputs))
    reads = family.topology.reads_texts and (task.has_answers or not task.new_tokens)
    picture = as_seen(collate, pair, seen.image if isinstance(seen.image, Tensor) else batch.inputs.get("pixel_values"))
    return SampleKept(task.prompt.format(pair.text) if reads else "", tuple(streams), said), picture


def answer(model: nn.Module, runs: Runs, inputs: dict[str, Tensor]) -> str | None:
    """What a model says of one sample: the text that it writes, greedily, or its score."""
    if not runs.task.new_tokens:
        return runs.task.said(runs.task.forward(model, inputs))
    tokens = runs.family.topology.generate(runs.family, model, inputs, runs.task.new_tokens)
    (written,) = runs.collate.processor.batch_decode(tokens, skip_special_tokens=True)
    return str(written).strip()


# In encoders -------------------------------------------------------------------------------------------------------------


def drops_tokens(model: nn.Module, family: Family) -> bool:
    return any(map(bool, (droppers(model, tower) for tower in family.towers))) or bool(stage_layers(model, family))


def droppers(model: nn.Module, tower: Tower) -> dict[int, Any]:
    """Number of a layer -> what lets tokens go in it."""
    found = ((index, getattr(layer, "token_pruning", None)) for index, layer in enumerate(tower_layers(model, tower)))
    return {index: pruning for index, pruning in found if pruning is not None}


@contextmanager
def watching(model: nn.Module, family: Family) -> Iterator[Heard]:
    """Hear which tokens stay, while the model runs over one sample. Of towers that run several times the first run counts."""
    heard = Heard()

    def remember(name: str) -> Callable[..., None]:
        def hook(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in heard.states:
                entered = args[0] if args else kwargs["inputs_embeds"]
                heard.entered[name], heard.states[name] = entered.shape[1], kwargs["token_state"]

        return hook

    with ExitStack() as hooks:
        for tower in family.towers:
            if droppers(model, tower):
                encoder = model.get_submodule(tower.encoder)
                hooks.callback(encoder.register_forward_hook(remember(tower.name), with_kwargs=True).remove)
        text = None if not (layers := stage_layers(model, family)) else model.get_submodule(_layout(model, family)["text"])
        for index, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(_remember_stage(heard, text, index)).remove)
        yield heard


def encoder_streams(model: nn.Module, runs: Runs, heard: Heard, inputs: Mapping[str, Tensor]) -> Iterator[StreamKept]:
    """The streams of the towers that were heard."""
    for tower in runs.family.towers:
        if tower.name not in heard.states:
            continue
        (stream,) = tower.streams
        state, entered, pruning = heard.states[tower.name], heard.entered[tower.name], droppers(model, tower)
        words, position = (None, _patch(stream)) if stream.source == "image" else words_of(runs.collate, inputs)
        count = entered - stream.skips_first if words is None else len(words)
        kept = []
        for layer in sorted(state.kept):
            places = (position(place) for place in state.positions(layer + 1)[0].tolist())
            stands = pruning[layer].merge and pruning[layer].keep > 1
            kept.append(KeptAt(layer, tuple(place for place in places if place is not None), merged=int(stands)))
        yield StreamKept(
            stream=stream.name,
            tower=tower.name,
            kind="image" if words is None else "text",
            at="behind",
            layers_of_tower=len(tower_layers(model, tower)),
            tokens=count,
            grid=runs.family.topology.raster(config_of(model).to_dict(), inputs, count) if words is None else None,
            words=words,
            layers=tuple(kept),
        )


def _patch(stream: Stream) -> Position:
    first = int(stream.skips_first)
    return lambda place: place - first if place >= first else None


def words_of(collate: Collator, inputs: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Position]:
    """The words of a text as its tokenizer cuts them, without the tokens around it and without padding; and which of them a
    token is."""
    tokenizer: Any = collate.topology.parts_of(collate.processor)[1]
    ids = inputs["input_ids"][0].tolist()
    mask = inputs["attention_mask"][0].tolist() if "attention_mask" in inputs else [1] * len(ids)
    named = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")
    special = {getattr(tokenizer, name, None) for name in named} | {*tokenizer("")["input_ids"]}
    places = [place for place, (token, real) in enumerate(zip(ids, mask, strict=True)) if real and token not in special]
    number = {place: index for index, place in enumerate(places)}
    return tuple(str(tokenizer.decode([ids[place]])).strip() for place in places), number.get


# In decoders -------------------------------------------------------------------------------------------------------------


def _layout(model: nn.Module, family: Family) -> dict[str, Any]:
    return family.topology.image_tokens(config_of(model).to_dict())


def stage_layers(model: nn.Module, family: Family) -> dict[int, nn.Module]:
    """Number of a layer of the decoder -> the layer, of those before which image tokens leave."""
    if family.topology.drops_in != "decoder":
        return {}
    layers = tower_layers(model, family.decoder_of_images[1])
    return {index: layer for index, layer in enumerate(layers) if getattr(layer, "comp_stage", None) is not None}


def _remember_stage(heard: Heard, text: Any, index: int) -> Callable[..., None]:
    """A hook before a layer: what is let go there has left by then."""

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        images = None if text.comp_current is None else text.comp_current.images
        if images is None or index in heard.stages:  # a token that is written behind the prompt
            return
        kept: list[int] = []
        stands: list[float] = []
        before = 0
        for row, (count, first) in enumerate(zip(images.counts, images.firsts, strict=True)):  # tiles of one picture
            kept += [before + place for place in images.positions[row, :count].tolist()]
            stands += [] if images.weights is None else images.weights[row, :count].tolist()
            before += first
        heard.stages[index], heard.tokens = KeptAt(index, tuple(kept), tuple(stands) or None), before

    return hook


def decoder_stream(model: nn.Module, family: Family, heard: Heard, inputs: Mapping[str, Tensor]) -> StreamKept:
    """The image tokens of a decoder that they leave."""
    name, tower = family.decoder_of_images
    return StreamKept(
        stream=name,
        tower=tower.name,
        kind="image",
        at="before",
        layers_of_tower=len(tower_layers(model, tower)),
        tokens=heard.tokens,
        grid=family.topology.raster(config_of(model).to_dict(), inputs, heard.tokens),
        words=None,
        layers=tuple(heard.stages[index] for index in sorted(heard.stages)),
    )


# Pictures ----------------------------------------------------------------------------------------------------------------


def as_seen(collate: Collator, pair: Pair, pixels: Tensor | None) -> Picture:
    """The picture of a pair as the model sees it, cropped as its processor crops; None for a model that reads none. Where
    pixels are no single image (patches, tiles) the whole picture."""
    if not collate.topology.reads_images:
        return None
    images, _ = collate.topology.parts_of(collate.processor)
    whole = pixels if pixels is None or pixels.dim() < 3 else pixels.flatten(0, -4) if pixels.dim() > 3 else pixels[None]
    if whole is None or len(whole) != 1 or whole.shape[1] != 3:
        picture = pair.image.convert("RGB")
    else:
        picture = Image.fromarray(colours(whole[0].float().cpu(), images).permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture


def colours(pixels: Tensor, processor: Any) -> Tensor:
    """What an image processor made of colours, (3, height, width), as colours again: bytes."""
    if processor.do_normalize:
        mean, std = (torch.as_tensor(value).view(-1, 1, 1) for value in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if processor.do_rescale:
        pixels = pixels / processor.rescale_factor
    return pixels.round().clamp(0, 255).byte()
