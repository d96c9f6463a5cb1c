"""Fine-tuning of what is pruned, after the search or inside it (CoMP's trained path).

Inside: a stage begins with a plan that is a little smaller. Tokens go at once; the units that go are multiplied with
alpha(t) = 1 - sin(pi t / 2I), from 1 to exactly 0 over the I steps of the stage, and are then sliced away. A stage trains as
long as it prunes: `stage_share` of all steps are shared out by the FLOPs that are removed; the others tune the final plan.

The loss is the task's, plus the divergence of the decisions from the dense model's, plus the distance of the features behind
them. Where nobody said what is right, the latter two alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, islice

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import tasks
from ..checkpoint.loading import untied_state_dict
from ..data.batches import Batch
from ..engine import flops, stages
from ..engine.fading import fade_at, fading, forget_head_masks
from ..engine.slicing import slice_state
from ..errors import DeadEnd, UsageError
from ..models.dense import Dense
from ..models.pairs import Pairs, warn_cut_texts
from ..options import MIXED_PRECISIONS, ResolvedTraining, Training
from ..plan import Plan
from ..progress import Progress
from ..report.base import Texts
from ..tasks import comparison
from .calibration import Calibration
from .processes import OwnState, joined, own_rows, precision, processes, rank, tensors_from_main
from .sharding import average_slopes, is_sharded, shard, shared_out, whole, whole_on_main

WARM_UP = 0.05  # of the steps
CHECKPOINTS = 10  # of the tuning, in the journal
WEIGHT_DECAY = 0.01
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of every parameter


def check_training(training: Training, data: str | None) -> None:
    """Raises UsageError for settings that make no sense together, and for epochs of generated scenes, which do not end. data:
    the user's."""
    if training.epochs is not None and training.steps:
        raise UsageError("--steps and --epochs: give one of them.")
    if training.epochs is not None and not 0 < training.epochs < math.inf:
        raise UsageError(f"--epochs {training.epochs}: expected a number above 0.")
    if training.epochs is not None and data is None:
        raise UsageError("--epochs needs --data: generated scenes have no end.", hint="Use --steps.")
    if not training.tunes and training != Training(batch_size=training.batch_size):
        hint = "Give --steps N, or --epochs E with --data."
        raise UsageError("--stage-share, --lr, --distill and --mixed-precision are for training.", hint=hint)
    if not 0 <= training.stage_share <= 1 or not 0 <= training.distill <= 1:
        raise UsageError("--stage-share and --distill are shares, from 0 to 1.")
    if training.lr is not None and not 0 < training.lr < 1:
        raise UsageError(f"--lr {training.lr}: expected a number between 0 and 1.")
    if training.mixed_precision not in (None, *MIXED_PRECISIONS):
        raise UsageError(f"--mixed-precision {training.mixed_precision}: expected one of {', '.join(MIXED_PRECISIONS)}.")


def count_steps(training: Training, task: tasks.Task, pairs: Pairs, progress: Progress) -> Training:
    """Epochs as steps."""
    if training.epochs is None:
        return training
    progress.say("counting the pairs ...")
    found = sum(1 for _ in pairs.read("calibration", accepts=task.accepts))
    return replace(training, steps=max(1, math.ceil(training.epochs * found / training.batch_size)))


def training_batches(dense: Dense, pairs: Pairs, training: ResolvedTraining, seed: int, skip: int) -> Iterator[Batch]:
    """Batches without end, in an order that the seed decides, from step `skip` on; the same in all processes."""
    passed, collate = 0, dense.collate
    for epoch in count(1):
        found = pairs.read("calibration", None, seed + epoch, dense.task.accepts)
        first = True
        ready = (collate.seen(pair) if passed >= skip else replace(pair, image=None) for pair in found)  # no picture is kept
        while chunk := list(islice(ready, training.batch_size)):
            if len(chunk) < training.batch_size and not first:
                break  # the rest of an epoch makes no whole batch
            first = False
            passed += 1
            if passed > skip:
                yield collate(chunk)


class Trainer:
    """Fine-tunes while it prunes. `measure` takes the place of `Calibration.measure`: to look at a plan it trains into it, so a
    plan that was looked at is taken."""

    def __init__(
        self,
        dense: Dense,
        training: ResolvedTraining,
        ratio: float,
        batches: Callable[[int], Iterator[Batch]],
        *,
        cit: bool = True,
        seed: int = 0,
    ):
        """batches: steps to skip -> batches without end."""
        self.dense, self.training, self.cit, self.seed = dense, training, cit, seed
        self.plan, self.done = dense.plan, 0
        self.state = {name: tensor.clone() for name, tensor in dense.state.items()}
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.total = flops.count(dense.plan, dense.reference).total
        self.ratio, self.batches = ratio, batches
        self.device = next(iter(dense.state.values())).device
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads of other tasks get no gradient
        how = {"mixed_precision": precision(training), "kwargs_handlers": [unused]}
        self.own = OwnState()
        with self.own.opened():
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", **how)
        self.teacher = dense.runtime(dense.plan)
        self._stream: Iterator[Batch] | None = None
        self.texts = Texts(cut=0, of=0, at=dense.text_tokens)  # that were read

    # The search ------------------------------------------------------------------------------------------------------

    def measure(self, calibration: Calibration, plan: Plan) -> stages.Measurement:
        """Train into the plan, unless it is the present one; then what it shows on the calibration pairs."""
        if plan != self.plan:
            self._fade_into(plan)
        return calibration.judge(self.dense.build(plan, self.state), plan)

    def take(self, plan: Plan, model: nn.Module) -> None:
        """Go on with a plan and a model that were found without training."""
        state = {name: tensor.detach().clone() for name, tensor in untied_state_dict(model).items()}
        self.plan, self.state = plan, tensors_from_main(state, self.device)

    def _fade_into(self, plan: Plan) -> None:
        removed = 1 - flops.count(plan, self.dense.reference).total / self.total
        due = round(self.training.stage_steps * min(removed / self.ratio, 1.0))
        steps = max(due - self.done, 0)
        model = self.dense.build(self.plan.with_keeps_of(plan), self.state)
        with fading(model, self.dense.family, self.plan, plan) as fade:
            if not self.cit:
                forget_head_masks(model)
            first = self.done
            self._train(model, steps, lambda step: self.training.lr, lambda step: fade(fade_at(step - first, steps)))
        smaller = plan.within(self.plan)
        self.state = slice_state(self.state, self.dense.family, smaller)
        self.moments = {kind: slice_state(found, self.dense.family, smaller) for kind, found in self.moments.items()}
        self.plan = plan

    # The tuning ------------------------------------------------------------------------------------------------------

    def tune(self, progress: Progress, save: Callable[[], None]) -> nn.Module:
        """Train the plan that was found for the steps that are left, the rate falling to zero as a cosine."""
        begin, end = self.training.stage_steps, self.training.steps

        def rate(step: int) -> float:
            passed = (step - 1 - begin) / max(end - begin, 1)
            return self.training.lr * 0.5 * (1 + math.cos(math.pi * max(passed, 0.0)))

        with progress.track("fine-tuning", end) as bar:
            bar.advance(by=self.done)
            sharded = self._share_out() if is_sharded() and self.done < end else None
            while self.done < end:
                model = sharded or self.dense.build(self.plan, self.state)
                steps = min(max(math.ceil((end - begin) / CHECKPOINTS), 1), end - self.done)
                loss = self._train(model, steps, rate, lambda step: bar.advance())
                bar.advance(f"fine-tuning, loss {loss:.3f}", by=0)
                save()
        warn_cut_texts("fine-tuning", self.texts, progress, self.dense.longest)
        self.moments = {}
        self.state = {name: whole(tensor) for name, tensor in self.state.items()}
        return self.dense.build(self.plan, self.state).requires_grad_(False)

    def _share_out(self) -> nn.Module:
        """The model to be tuned, with its weights and moments shared out over the processes; they go on in `self.state` and
        `self.moments`."""
        model, names = self.dense.build(self.plan, self.state), set(self.state)
        self.state = {}  # which is whole: layer by layer it becomes free
        shard(model, self.dense.family)
        self.state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in names}
        parameters = dict(model.named_parameters())
        self.moments = {kind: shared_out(self.moments.get(kind, {}), parameters) for kind in MOMENTS}
        return model

    # Both ------------------------------------------------------------------------------------------------------------

    def _train(self, model: nn.Module, steps: int, rate: Callable[[int], float], before: Callable[[int], None]) -> float:
        """`steps` steps of AdamW on the model, whose weights are those of `self.state`; returns the last loss."""
        if not steps:
            return math.nan
        with self.own.opened():
            return self._take_steps(model, steps, rate, before)

    def _take_steps(self, model: nn.Module, steps: int, rate: Callable[[int], float], before: Callable[[int], None]) -> float:
        if self._stream is None:
            self._stream = self.batches(self.done)
        model.train().requires_grad_(True)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        matrices, vectors, numbers = ([p for p in names if min(p.ndim, 2) == ndim] for ndim in (2, 1, 0))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": found, "weight_decay": 0.0} for found in (vectors, numbers)]
        optimizer = torch.optim.AdamW(groups, lr=self.training.lr)
        if self.moments:
            for parameter, name in names.items():
                if name in self.moments[MOMENTS[0]]:
                    known = {kind: self.moments[kind][name] for kind in MOMENTS}
                    optimizer.state[parameter] = known | {"step": torch.tensor(float(self.done))}
        ready = (model, optimizer)
        if not is_sharded():
            ready = self.accelerator.prepare(*ready, device_placement=[False, False])
        prepared, driver = ready
        loss = torch.tensor(math.nan)
        for _ in range(steps):
            self.done += 1
            warm = min(1.0, self.done / max(1, round(WARM_UP * self.training.steps)))
            for group in optimizer.param_groups:
                group["lr"] = warm * rate(self.done)
            before(self.done)
            torch.manual_seed((self.seed * 1_000_003 + self.done) * processes() + rank())  # dropout, the same after a resume
            batch = next(self._stream)
            self.texts = replace(self.texts, cut=self.texts.cut + batch.cut, of=self.texts.of + batch.samples)
            loss = self._loss(prepared, batch)
            self.accelerator.backward(loss * processes())  # whose slopes are averaged, and are parts of one sum
            if is_sharded():
                average_slopes(numbers)
            self.accelerator.clip_grad_norm_(list(names), 1.0)
            driver.step()
            driver.zero_grad()
        if not math.isfinite(loss.item()):
            raise DeadEnd(f"the loss is {loss.item()} at step {self.done}.", hint="Try a smaller --lr.")
        self.state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in self.state}
        self.moments = {
            kind: {names[p]: found[kind] for p, found in optimizer.state.items() if kind in found} for kind in MOMENTS
        }
        self.accelerator.free_memory()
        return loss.item()

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the whole batch, of which each process runs its rows; one without any runs a row that does not count."""
        weight = next(iter(self.state.values()))
        batch = batch.to(weight.device, weight.dtype)
        own = own_rows(batch.samples)
        none = own.start == own.stop
        inputs = batch.inputs if processes() == 1 else batch.piece(0 if none else own.start, 1 if none else own.stop).inputs
        # On the CPU in half precision the fused kernel's backward pass is the slower one.
        slow = weight.device.type == "cpu" and self.accelerator.mixed_precision != "no"
        task = self.dense.task
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext(), self.accelerator.autocast():
            here = task.forward(model, inputs)
            with torch.no_grad():
                there = task.forward(self.teacher, inputs)
        read, wanted = (joined(tuple(part[:0] if none else part for part in parts)) for parts in (here, there))
        rankings = task.rankings(read, batch.labels)
        decisions = comparison.divergence(task.rankings(wanted, batch.labels), rankings)
        features = comparison.feature_distance(task.features(wanted), task.features(read))
        if batch.labels is None:
            return decisions + features
        share = self.training.distill
        return (1 - share) * comparison.loss(rankings) + share * decisions + features

    # The journal -----------------------------------------------------------------------------------------------------

    def to_tensors(self) -> dict[str, Tensor]:
        """Weights and moments, by name; with the plan and the number of steps all that the next step depends on. Where they are
        shared out the first process has them, and all have to ask."""
        kinds = {"weight": self.state, **self.moments}
        named = {f"{kind}/{name}": tensor for kind, found in kinds.items() for name, tensor in found.items()}
        return whole_on_main(named) if is_sharded() else named

    def restore(self, plan: Plan, done: int, tensors: dict[str, Tensor]) -> None:
        """Go on from a journal; `tensors`: what the first process read of it."""
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("weight", *MOMENTS)}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            kinds[kind][rest] = tensor
        self.state, self.plan, self.done = tensors_from_main(kinds.pop("weight"), self.device), plan, done
        if not is_sharded():  # else they wait until the weights are shared out
            kinds = {kind: tensors_from_main(found, self.device) for kind, found in kinds.items()}
        self.moments = {kind: found for kind, found in kinds.items() if found}
