"""What every command needs before it can work: a model with its family, its processor, its data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from .. import tasks
from ..checkpoint import hub, loading
from ..data import batches as data
from ..data.pairset import PairSet
from ..data.rows import Accepts, Columns, Pair, every
from ..data.sources import open_pairs
from ..data.splits import Purpose
from ..engine import flops, scoring
from ..engine.recover import Fitted, recover
from ..engine.slicing import slice_state
from ..engine.token_ranking import with_score_rows
from ..errors import RefusedError, first_line
from ..families import Family, find_family
from ..files.store import read_config
from ..options import HUB_DEFAULTS, LARGE_FLOPS, SCORE_ROWS, TEXT_TOKENS, DataOptions, HubOptions
from ..plan import Plan, dense_plan
from ..progress import Progress


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
    def collate(self) -> data.Collator:
        """Makes batches of pairs for this model, of texts as long as the reference input."""
        return collator(self.family, self.processor, self.text_tokens, self.task, self.hf_config)

    @property
    def text_tokens(self) -> int:
        """Tokens of a text of the reference input; 0 for a model of images."""
        return self.family.topology.text_tokens(self.reference.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model takes."""
        return longest_text(self.hf_config.to_dict(), self.family, self.processor)

    @property
    def collate_whole(self) -> data.Collator:
        """The same, of texts as long as the model takes, which is what it will be fed."""
        return collator(self.family, self.processor, self.longest, self.task, self.hf_config)

    def random_inputs(self, batch: int, text_tokens: int, **options: int) -> dict[str, Tensor]:
        """Noise that the model takes; see `data.random_inputs`."""
        return data.random_inputs(self.hf_config, self.family, batch, text_tokens, **options)

    def params(self, plan: Plan) -> int:
        """Parameters of the model of a plan; shared ones count once."""
        sliced = slice_state(self.state, self.family, plan).values()
        return sum({tensor.data_ptr(): tensor.numel() for tensor in sliced}.values())

    def on_device(self, batches: list[data.Batch]) -> Iterator[dict[str, Tensor]]:
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

    def build(self, plan: Plan, state: Mapping[str, Tensor]) -> nn.Module:
        """The model of a plan around weights that have its sizes."""
        config = self.hf_config.__class__.from_dict(self.hf_config.to_dict())
        config.comp = plan.comp_block(self.family)
        return loading.build_compact(config, self.family, self.architecture, state)


def open_dense(
    model: str,
    progress: Progress,
    *,
    text_tokens: int = TEXT_TOKENS,
    score_rows: int = SCORE_ROWS,
    device: torch.device | None = None,
    task: str | None = None,
    hub_options: HubOptions = HUB_DEFAULTS,
) -> Dense:
    """Resolve, check and load a dense model in fp32, for its usual task or another. Raises RefusedError for a model that is
    compact already."""

    def described(config: dict[str, Any]) -> tuple[Family, str, str]:
        found = find_family(config, task)
        if "comp" in config:
            raise RefusedError(
                f"{model} is a compact model already.",
                hint="Start from the dense model that it was made of: its config.json names it under comp.base_model.",
            )
        return found

    source = hub.resolve(model, progress=progress, accepts=described, **vars(hub_options))
    config = read_config(source.folder)
    family, architecture, name = described(config)
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


def collator(
    family: Family, processor: Any, max_text: int, task: tasks.Task, config: transformers.PretrainedConfig
) -> data.Collator:
    """What makes batches of a task for the models of a family, of texts of `max_text` tokens at most."""
    begin = family.topology.first_token(family, config.to_dict())
    return data.Collator(processor, family.topology, max_text, task.labels, task.prompt, begin)


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


def by_model_size(dense: Dense, many: float, few: float) -> float:
    """A number of samples and the like: many for a small model (see options.LARGE_FLOPS), few for a larger one."""
    return many if flops.count(dense.plan, dense.reference).total < LARGE_FLOPS else few


@dataclass(frozen=True)
class ScenePairs:
    """Generated scenes as a set of pairs: with captions that match or do not, or (`described`) with descriptions that match, or
    (`asked`) with questions and answers. Labelled for models that were trained on them only."""

    labelled: bool
    described: bool = False
    asked: bool = False

    SPLITS: ClassVar = {"calibration": "train", "evaluation": "test"}

    def describe(self, purpose: Purpose) -> str:
        return f"generated scenes, split {self.SPLITS[purpose]}"

    def counts(self) -> dict[str, dict[str, Any]]:
        """Nothing is skipped."""
        return {}

    def read(self, purpose: Purpose, limit: int | None = None, seed: int = 0, accepts: Accepts = every) -> Iterator[Pair]:
        """Up to `limit` pairs, of which there are more than anybody asks for. All are taken."""
        count = 10**8 if limit is None else limit
        make = data.vqa_scenes if self.asked else data.caption_scenes if self.described else data.scene_pairs
        return make(self.SPLITS[purpose], count, seed, self.labelled)


Pairs = ScenePairs | PairSet


def choose_pairs(dense: Dense, options: DataOptions, progress: Progress, cache_dir: Path | None = None) -> Pairs:
    """The user's pairs, or generated scenes with a warning for models that do not know them."""
    if options.data is not None:
        named = (options.image_column, options.text_column, options.label_column, options.answer_column, options.split_column)
        columns = Columns(*named)
        progress.say(f"{dense.task.name}: {dense.task.compares}")
        return open_pairs(options.data, progress=progress, split=options.split, columns=columns, cache_dir=cache_dir)
    if dense.source.kind != "demo":
        progress.warn(f"{dense.source.name} is calibrated on generated scenes: --data with your own pairs keeps more accuracy.")
    elif not dense.task.has_negatives:
        progress.warn(f"the demo model was never trained for {dense.task.name}: what it says is chance.")
    return generated_pairs(dense.task, labelled=dense.source.kind == "demo" and dense.task.has_negatives)


def generated_pairs(task: tasks.Task, labelled: bool) -> ScenePairs:
    """Scenes with the texts that a task reads."""
    return ScenePairs(labelled, described=not task.has_negatives, asked=task.has_answers)


def batches_of(dense: Dense, pairs: Pairs, purpose: Purpose, samples: int, batch_size: int, seed: int = 0) -> list[data.Batch]:
    """Batches of model inputs for a purpose, "calibration" or "evaluation"; the two share no image."""
    return list(dense.collate.batches(pairs.read(purpose, samples, seed, dense.task.accepts), batch_size))


def cut_texts(batches: Sequence[data.Batch], longest: int) -> dict[str, int]:
    """How many of the texts were cut, and at how many tokens."""
    return {"cut": sum(batch.cut for batch in batches), "of": sum(batch.samples for batch in batches), "at": longest}


def warn_cut_texts(purpose: str, texts: Mapping[str, int], progress: Progress, most: int) -> None:
    """A warning where texts were cut; `most`: tokens that the model takes."""
    if texts["cut"]:
        more = "--text-tokens takes more" if texts["at"] < most else "the model takes no more"
        progress.warn(f"{purpose}: {texts['cut']} of {texts['of']} texts are cut at {texts['at']} tokens ({more}).")
