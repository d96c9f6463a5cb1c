"""A dense model, opened and described: what every command needs before it can work."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from .. import tasks
from ..checkpoint import hub, loading
from ..data.batches import Batch, Collator, random_inputs
from ..data.rows import Pair
from ..engine import flops, scoring
from ..engine.recover import Fitted, recover
from ..engine.slicing import slice_state
from ..engine.token_ranking import with_score_rows
from ..errors import RefusedError, first_line
from ..families import Family, find_family
from ..files.store import read_config
from ..options import HUB_DEFAULTS, LARGE_FLOPS, SCORE_ROWS, TEXT_TOKENS, HubOptions
from ..plan import Plan, dense_plan
from ..progress import Progress
from .part_params import part_params

Found = tuple[hub.Source, dict[str, Any], tuple[Family, str, str]]  # source, config.json; family, architecture, task
Accepts = Callable[[dict[str, Any], Family, str], None]  # of a config.json as it is, its family and architecture


@dataclass
class Dense:
    """A dense model, described. `state` holds its weights; `runtime(plan)` builds a model of any plan around them."""

    source: hub.Source
    config: dict[str, Any]  # config.json as it is
    family: Family
    task: tasks.Task
    plan: Plan
    reference: flops.Reference
    state: dict[str, Tensor]
    hf_config: transformers.PretrainedConfig
    processor: Any

    @property
    def architecture(self) -> str:
        return self.plan.architecture

    @property
    def collate(self) -> Collator:
        """Makes batches of pairs for this model, of texts as long as the reference input."""
        return collator(self.family, self.processor, self.text_tokens, self.task, self.hf_config)

    @property
    def is_large(self) -> bool:
        """Whether a pass over a pair costs so much that everything is done less often."""
        return flops.count(self.plan, self.reference).total >= LARGE_FLOPS

    @property
    def text_tokens(self) -> int:
        """Tokens of a text of the reference input; 0 for a model of images."""
        return self.family.topology.text_tokens(self.reference.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model takes."""
        return longest_text(self.hf_config.to_dict(), self.family, self.processor)

    @property
    def collate_whole(self) -> Collator:
        """The same, of texts as long as the model takes, which is what it will be fed."""
        return collator(self.family, self.processor, self.longest, self.task, self.hf_config)

    def random_inputs(self, batch: int, text_tokens: int, **options: int) -> dict[str, Tensor]:
        """Noise that the model takes; see `batches.random_inputs`."""
        return random_inputs(self.hf_config, self.family, batch, text_tokens, **options)

    def params(self, plan: Plan) -> int:
        """Parameters of the model of a plan; shared ones count once."""
        sliced = slice_state(self.state, self.family, plan).values()
        return sum({tensor.data_ptr(): tensor.numel() for tensor in sliced}.values())

    def part_params(self, plan: Plan) -> dict[scoring.Key, int]:
        """Parameters of each part of a plan's layers. Of shapes alone: no weight is copied."""
        shapes = {name: tensor.to("meta") for name, tensor in self.state.items()}
        return part_params(slice_state(shapes, self.family, plan).items(), self.family)

    def on_device(self, batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
        """The inputs of batches where the weights are, in their precision."""
        weight = next(iter(self.state.values()))
        return (batch.to(weight.device, weight.dtype).inputs for batch in batches)

    def runtime(self, plan: Plan, grams: Mapping[scoring.Key, Tensor] | None = None, fitted: Fitted | None = None) -> nn.Module:
        """The model of a plan, on the fused kernels, recovered where Gram matrices are given. Weights that stay as they
        are are shared with the dense model."""
        state = slice_state(self.state, self.family, plan)
        if grams is not None:
            state = recover(state, self.state, self.family, plan, grams, {} if fitted is None else fitted)
        return self.build(plan, state)

    @cached_property
    def whole(self) -> nn.Module:
        """The dense model on the fused kernels, made once; to be run, not to be changed."""
        return self.runtime(self.plan).requires_grad_(False)

    def build(self, plan: Plan, state: Mapping[str, Tensor]) -> nn.Module:
        """The model of a plan around weights that have its sizes."""
        config = self.hf_config.__class__.from_dict(self.hf_config.to_dict())
        config.comp = plan.comp_block(self.family, self.hf_config.to_dict())
        return loading.build_compact(config, self.family, self.architecture, state)


def open_dense(
    model: str,
    progress: Progress,
    *,
    text_tokens: int = TEXT_TOKENS,
    score_rows: int = SCORE_ROWS,
    device: torch.device | None = None,
    task: str | None = None,
    accepts: Accepts = lambda config, family, architecture: None,
    hub_options: HubOptions = HUB_DEFAULTS,
    found: Found | None = None,
) -> Dense:
    """Resolve, check and load a dense model in fp32, for its usual task or another. Raises RefusedError for a model that is
    compact already. accepts: raises what speaks against a model, before its weights are downloaded. found: see `find_dense`,
    where it was asked before."""
    source, config, (family, architecture, name) = found or find_dense(model, progress, task, accepts, hub_options)
    chosen = tasks.TASKS[name].of(family.topology)
    progress.say(f"loading {source.name} ({architecture}) ...")
    processor = loading.load_processor(source.folder)
    pickled = hub_options.allow_pickle
    dense: Any = loading.load_model(source.folder, family=family, dtype=torch.float32, allow_pickle=pickled)
    check_fits(dense, family, processor, chosen, source.name)
    state = loading.untied_state_dict(dense.requires_grad_(False).to(device or "cpu"))
    full = dense.config.to_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    reference = flops.reference(full, family, shapes, loading.cut_at(processor, text_tokens))
    return Dense(
        source=source,
        config=config,
        family=family,
        task=chosen,
        plan=with_score_rows(dense_plan(full, family, architecture), score_rows, family),
        reference=reference,
        state=state,
        hf_config=dense.config,
        processor=processor,
    )


def find_dense(model: str, progress: Progress, task: str | None, accepts: Accepts, hub_options: HubOptions) -> Found:
    """Where a dense model is, its config.json, and its family, architecture and task; see `open_dense`."""

    def dense(config: dict[str, Any], family: Family, architecture: str) -> None:
        if "comp" in config:
            raise RefusedError(
                f"{model} is a compact model already.",
                hint="Start from the dense model that it was made of: its config.json names it under comp.base_model.",
            )
        accepts(config, family, architecture)

    return find_model(model, progress, task, dense, hub_options)


def find_model(model: str, progress: Progress, task: str | None, accepts: Accepts, hub_options: HubOptions) -> Found:
    """The same of a model that may be compact."""

    def described(config: dict[str, Any]) -> tuple[Family, str, str]:
        found = find_family(config, task)
        accepts(config, *found[:2])
        return found

    source = hub.resolve(model, progress=progress, accepts=described, **vars(hub_options))
    config = read_config(source.folder)
    return source, config, described(config)


def collator(
    family: Family, processor: Any, max_text: int, task: tasks.Task, config: transformers.PretrainedConfig
) -> Collator:
    """What makes batches of a task for the models of a family, of texts of `max_text` tokens at most."""
    begin = family.topology.first_token(family, config.to_dict())
    return Collator(processor, family.topology, max_text, task.labels, task.prompt, begin, task.has_answers)


def longest_text(config: dict[str, Any], family: Family, processor: Any) -> int:
    """Tokens of the longest text that a model and its tokenizer take, at most 512; 0 for a model of images."""
    return loading.cut_at(processor, min(family.topology.longest_text(family, config), 512))


def check_fits(model: Any, family: Family, processor: Any, task: tasks.Task, name: str) -> None:
    """Raises RefusedError where the parts that the family describes are missing, or the processor makes what the model cannot
    take."""
    problem = None
    for tower in family.towers:
        layer = getattr(model.get_submodule(tower.encoder), tower.layers)[0]
        for part in tower.parts:
            if part.is_attention and not any(path == part.module for path, _ in layer.named_modules()):
                problem = f"its {tower.name} tower has no {part.module}"
    try:
        batch = collator(family, processor, 4, task, model.config)([Pair(Image.new("RGB", (32, 32)), "a", answers=("a",))])
        with torch.inference_mode():
            made = model(**batch.inputs)
        if not all(value.isfinite().all() for value in made.values() if isinstance(value, Tensor)):
            problem = "what it says of a plain picture is not finite"
    except Exception as error:
        problem = problem or f"what its processor makes does not go through it ({first_line(error)})"
    if problem:
        raise RefusedError(f"{name}: {problem}.", hint="config.json, weights and processor files must fit.")


class Weighed(Protocol):
    """A model, with its weights or without."""

    @property
    def is_large(self) -> bool: ...


def by_model_size(dense: Weighed, many: float, few: float) -> float:
    """A number of samples and the like: many for a small model (see options.LARGE_FLOPS), few for a larger one."""
    return few if dense.is_large else many
