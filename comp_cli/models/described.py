"""A dense model, described by its config and the headers of its weights: all that a plan of token stages needs, in seconds for
any size. No weight is read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import transformers
from torch import Tensor, nn

from .. import tasks
from ..checkpoint import hub, loading
from ..checkpoint.header_check import as_named_now, check_shapes, few, on_meta, read_headers
from ..checkpoint.weight_files import check_checkpoint
from ..engine import flops
from ..engine.description_check import Shape
from ..engine.slicing import slice_state
from ..errors import RefusedError
from ..families import Family
from ..files.store import TensorHeader
from ..options import HUB_DEFAULTS, LARGE_FLOPS, TEXT_TOKENS, HubOptions
from ..plan import Plan, dense_plan
from ..progress import Progress
from .dense import Accepts, Found, find_dense

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Described:
    """A dense model without its weights. `files` hold them, safetensors; `shapes` are those of its parameters and buffers."""

    source: hub.Source
    config: dict[str, Any]  # config.json as it is
    family: Family
    task: tasks.Task
    plan: Plan
    reference: flops.Reference
    hf_config: transformers.PretrainedConfig
    processor: Any
    files: tuple[str, ...]
    headers: Mapping[str, TensorHeader]  # under the names that the files have
    params: int  # shared ones count once
    state: Mapping[str, Tensor]  # weights without memory, shared ones once

    @property
    def is_large(self) -> bool:
        """See Dense."""
        return flops.count(self.plan, self.reference).total >= LARGE_FLOPS

    @property
    def text_tokens(self) -> int:
        """See Dense."""
        return self.family.topology.text_tokens(self.reference.tokens)

    def params_of(self, plan: Plan) -> int:
        """Parameters of the model of a plan; shared ones count once."""
        sliced = slice_state(self.state, self.family, plan)
        before = sum(tensor.numel() for tensor in self.state.values())
        return self.params - before + sum(tensor.numel() for tensor in sliced.values())

    @property
    def architecture(self) -> str:
        return self.plan.architecture

    @property
    def images(self) -> "ImageShape":
        return image_shape(self.hf_config.to_dict(), self.family)

    @cached_property
    def bytes_of_a_number(self) -> int:
        """Of the precision that most numbers are stored in, which caches have as well."""
        held: dict[str, int] = {}
        for header in self.headers.values():
            held[header.dtype] = held.get(header.dtype, 0) + math.prod(header.shape)
        return BYTES.get(max(held, key=lambda kind: held[kind]), 4)


def dense_flops(config: transformers.PretrainedConfig, family: Family, architecture: str, text_tokens: int) -> int:
    """FLOPs of one sample of the stock model of a config, at a text of so many tokens; from shapes alone. Of the config of a
    compact model: of the dense one that it was made of."""
    full = config.to_dict()
    with loading.quiet_libraries():
        skeleton = on_meta(getattr(transformers, architecture), config)
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    plan = dense_plan(full, family, architecture)
    return flops.count(plan, flops.reference(full, family, shapes, text_tokens)).total


class ImageShape(NamedTuple):
    """What a schedule of token stages depends on."""

    image_tokens: int  # of the reference image
    layers: int  # of the decoder
    class_token: bool  # whether the tower that sees the image has a [CLS] whose attention ranks patches
    clip: bool  # whether that tower is CLIP's


def image_shape(config: Mapping[str, Any], family: Family) -> ImageShape:
    """Of a decoder that reads images, by its whole config.json, defaults filled in."""
    name, tower = family.decoder_of_images
    tokens = family.topology.lengths(family, config, 1)[name]
    ranks = family.topology.image_tokens(config)["class_attention"] is not None
    clip = config["vision_config"]["model_type"] == "clip_vision_model"
    return ImageShape(tokens, family.sections(config)[tower.name][tower.depth], ranks, clip)


def describe_dense(
    model: str,
    progress: Progress,
    *,
    text_tokens: int = TEXT_TOKENS,
    task: str | None = None,
    accepts: Accepts = lambda config, family, architecture: None,
    hub_options: HubOptions = HUB_DEFAULTS,
    found: Found | None = None,
) -> Described:
    """Resolve and check a dense model, for its usual task or another. Raises RefusedError for what `open_dense` refuses by
    config, headers and processor files, and for weights that are pickled."""
    source, config, (family, architecture, name) = found or find_dense(model, progress, task, accepts, hub_options)
    progress.say(f"reading the headers of {source.name} ({architecture}) ...")
    files = check_checkpoint(source.folder, allow_pickle=hub_options.allow_pickle)
    if not all(file.endswith(".safetensors") for file in files):
        hint = "Load it with transformers and save_pretrained it, and give that folder."
        raise RefusedError(f"{source.name}: its weights are pickled ({files[0]}), and are handed on as they are.", hint=hint)
    processor = loading.load_processor(source.folder)
    hf_config, _ = loading.describe(source.folder)
    headers = read_headers(source.folder, files)
    with loading.sentences(source.folder), loading.quiet_libraries():
        stock = getattr(transformers, architecture)
        skeleton, named = on_meta(stock, hf_config), as_named_now(headers, hf_config, family, stock)
        loading.check_sizes(hf_config.to_dict(), family, named, source.folder)
        check_shapes(named, skeleton, source.folder)
    check_complete(named, skeleton, source.name)
    full, tied = hf_config.to_dict(), cast(dict[str, str], skeleton.all_tied_weights_keys)
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    return Described(
        source=source,
        config=config,
        family=family,
        task=tasks.TASKS[name].of(family.topology),
        plan=dense_plan(full, family, architecture),
        reference=flops.reference(full, family, shapes, loading.cut_at(processor, text_tokens)),
        hf_config=hf_config,
        processor=processor,
        files=tuple(files),
        headers=headers,
        params=sum(parameter.numel() for _, parameter in own_parameters(skeleton)),
        state={name: tensor for name, tensor in skeleton.state_dict().items() if name not in tied},
    )


def own_parameters(skeleton: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of a model without weights, in which nothing is tied yet, without those that will be another one's."""
    tied: Any = skeleton.all_tied_weights_keys
    return [(name, parameter) for name, parameter in skeleton.named_parameters() if name not in tied]


def check_complete(headers: Mapping[str, TensorHeader], skeleton: nn.Module, name: str) -> None:
    """Raises RefusedError where the files lack a parameter, which a loader would fill with random numbers."""
    tied: Any = skeleton.all_tied_weights_keys
    lacking = [key for key, _ in skeleton.named_parameters() if key not in headers and key not in tied]
    if lacking:
        said = f"{name}: weights and config.json do not agree (missing keys: {few(lacking)})."
        raise RefusedError(said, hint="comp takes all or nothing: missing weights would be randomly initialised.")
