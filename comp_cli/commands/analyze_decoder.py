"""`comp analyze` of a decoder that reads images: where parameters and FLOPs are, what its cache holds, and what it would save
if image tokens left. From config.json and the headers of the weights alone, so in seconds for any size."""

import math
from collections.abc import Mapping
from dataclasses import replace

import transformers

from .. import __version__
from ..checkpoint.header_check import on_meta
from ..checkpoint.loading import quiet_libraries
from ..engine import flops, token_schedules
from ..engine.description_check import matching
from ..errors import UsageError
from ..models.described import Described, describe_dense, own_parameters
from ..options import AnalyzeOptions, HubOptions
from ..progress import Progress
from ..report.analyze import AnalyzeReport, Cost, DecoderCost, PartCost, Saving
from ..report.base import Reference, Texts
from . import threads

SHARES = (1 / 3, 2 / 9, 1 / 9)  # of image tokens, mean over layers, which papers compare
SCHEDULES = ("vitcop", "divprune")  # the first one that can be with so few tokens in so many layers
LEFT_OUT = (
    "how unequal heads, channels and tokens are, and how their scores interfere, is left out: it is not measured on decoders "
    "that read images. What is shown follows from the shapes of the weights."
)
Parts = Mapping[str, int]


def analyze_decoder(options: AnalyzeOptions, progress: Progress, hub_options: HubOptions) -> AnalyzeReport:
    """Describe a dense decoder. Raises what `describe_dense` raises, and UsageError for pairs, which nothing is measured on."""
    if options.data.data is not None:
        said = f"--data {options.data.data}: nothing of a decoder that reads images is measured on pairs by comp analyze."
        raise UsageError(said, hint="Leave it out; comp prune --data measures quality.")
    text_tokens = options.text_tokens
    dense = describe_dense(options.model, progress, text_tokens=text_tokens, task=options.task, hub_options=hub_options)
    progress.warn(LEFT_OUT)
    counted, params = flops.count(dense.plan, dense.reference), part_params(dense)
    outside = params["projector"] + params["embeddings"] + params["logits"]
    return AnalyzeReport(
        comp_version=__version__,
        model=dense.source.name,
        revision=dense.source.revision,
        architecture=dense.architecture,
        task=dense.task.name,
        reference=Reference(dense.reference.tokens),
        params=Cost(dense.params, outside),
        flops=Cost(counted.total, counted.fixed),
        layers=(),
        inequality=(),
        diagnostics=None,
        score_rows={},
        samples=0,
        data="no pairs",
        pairs={},
        texts=Texts(0, 0, dense.family.topology.text_tokens(dense.reference.tokens)),
        threads=threads.in_use(),
        decoder=DecoderCost(
            image_tokens=dense.images.image_tokens,
            layers=dense.images.layers,
            class_token=dense.images.class_token,
            parts=parts(dense, counted, params),
            kv_cache_bytes=sum(flops.kv_bytes(dense.plan, dense.reference, dense.bytes_of_a_number)),
            savings=tuple(found for share in SHARES if (found := saving(dense, share)) is not None),
        ),
    )


def part_params(dense: Described) -> dict[str, int]:
    """Parameters of each part; a matrix that embeds and makes logits counts as embeddings."""
    topology, tower = dense.family.topology, dense.family.decoder_of_images[1]
    with quiet_libraries():
        skeleton = on_meta(getattr(transformers, dense.architecture), dense.hf_config)
    found = dict.fromkeys(("vision tower", "projector", "decoder layers", "embeddings", "logits"), 0)
    layout = topology.image_tokens(dense.hf_config.to_dict())
    roots = {
        f"{layout['features']}.": "vision tower",
        f"{tower.encoder}.{tower.layers}.": "decoder layers",
        f"{layout['text']}.": "embeddings",  # what is left of the language model: these, and a norm
        "lm_head.": "logits",
    }
    for name, tensor in own_parameters(skeleton):
        part = next((part for root, part in roots.items() if name.startswith(root)), "projector")
        found[part] += tensor.numel()
    return found


def parts(dense: Described, counted: flops.Flops, params: Parts) -> tuple[PartCost, ...]:
    """FLOPs of the prompt and of a token behind it, and parameters. What is no layer, no logits and embeds no patches makes
    image tokens of features."""
    reference, family = dense.reference, dense.family
    decoder = family.decoder_of_images[1].name
    vision = sum(counted.tower(tower.name) for tower in family.towers if tower.name != decoder) + patch_flops(dense)
    step = flops.decode_step(dense.plan, reference)
    attention, feed_forward = (
        (counted.part(decoder, name), sum(layer.parts[name] for layer in step.layers)) for name in ("attention", "ffn")
    )
    projector = counted.total - vision - sum(attention[:1]) - sum(feed_forward[:1]) - reference.step
    return (
        PartCost("vision tower", vision, 0, params["vision tower"]),
        PartCost("projector", projector, 0, params["projector"]),
        PartCost("decoder layers", attention[0] + feed_forward[0], attention[1] + feed_forward[1], params["decoder layers"]),
        PartCost("logits", reference.step, reference.step, params["logits"]),
        PartCost("embeddings", 0, 0, params["embeddings"]),
    )


def patch_flops(dense: Described) -> int:
    """FLOPs of embedding the patches of the reference image."""
    config, family = dense.hf_config.to_dict(), dense.family
    with quiet_libraries():
        state = on_meta(getattr(transformers, dense.architecture), dense.hf_config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    patches = family.topology.uses(family, config, dense.reference.tokens)["patches"]
    paths = [path for path, often in family.fixed.items() if often == "patches"]
    return sum(2 * math.prod(shapes[name]) * patches for path in paths for name in matching(path, shapes))


def saving(dense: Described, share: float) -> Saving | None:
    """What it saves if a share of the image tokens stays, mean over layers; None where no schedule reaches it."""
    tokens, layers, *_ = dense.images
    for method in SCHEDULES:
        try:
            stages = token_schedules.stages(
                method, tokens=round(share * tokens), share=None, fixed_size=True, **dense.images._asdict()
            )
        except UsageError:
            continue
        plan = replace(dense.plan, stages=stages)
        after, before = (flops.count(each, dense.reference).total for each in (plan, dense.plan))
        return Saving(
            method=method,
            tokens=round(token_schedules.mean_tokens(stages, tokens, layers), 4),
            stages=",".join(f"{stage.layer}:{stage.left(tokens)}" for stage in stages),
            flops=after,
            flops_reduction=before / after,
            step_flops=flops.decode_step(plan, dense.reference).total,
            kv_cache_bytes=sum(flops.kv_bytes(plan, dense.reference, dense.bytes_of_a_number)),
        )
    return None
