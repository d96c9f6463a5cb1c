"""The search of a model that is larger than memory: what TrainingFree does, all pairs through one layer after the other.

Of the weights one layer is in memory, dense and compact, and in a pass each is read once for all pairs. The numbers are those
of a search in memory: the same functions gather, price, fit and judge. The pass back is exact: what entered a layer is kept on
disk, the layer runs again with what it says remembered, and its slopes are handed down to the layer before it. Gram matrices
lie on disk as well. The vision tower and the projector stay as they are, and only make what enters the decoder.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..engine import scoring
from ..engine.allocation import Judged
from ..engine.decoder_scores import Prompts, listening
from ..engine.sequential_refit import (
    Call,
    entering_calls,
    first_changed,
    left_once,
    refit_layer,
    step_watched,
    watching,
)
from ..engine.statistics import Statistics, even_prices, prices_of_part
from ..errors import RefusedError
from ..models.streamed import ModelOnDisk, StreamedDense
from ..options import EFFORTS, PruneOptions
from ..plan import Plan
from ..progress import Progress
from ..tasks import Outputs, comparison
from .calibration import PROBED, drawn_by, halved, judged, probe, split
from .journal import Journal
from .training_free import State

Inputs = dict[str, Tensor]
Each = Callable[[int, nn.Module], None]  # of a layer's number and the layer


def leave(index: int, layer: nn.Module) -> None:
    """Nothing is done with a layer."""


class Streaming:
    """The search of a run that trains nothing, with the weights on disk; in the place of TrainingFree."""

    is_over = False

    def __init__(
        self,
        dense: StreamedDense,
        options: PruneOptions,
        batches: list[Batch],
        judges: list[Batch],
        journal: Journal | None,
        progress: Progress,
        *,
        searches: bool = True,
    ):
        """batches: calibration pairs. judges: those of them that judge a plan. searches: whether units need prices."""
        self.dense, self.judges, self.journal, self.progress = dense, judges, journal, progress
        self.effort = EFFORTS[options.effort]
        self.recovers, self.sequential = options.recover, options.recover and options.sequential
        how: dict[str, Any] = {"weighted": options.cip, "seed": options.seed, "searches": searches}
        self.prices: dict[scoring.Key, Tensor] | None = even_prices(dense.plan) | gather_prices(dense, batches, progress, **how)
        self._expected: list[Tensor] | None = None

    def restore(self, saved: dict[str, Any], plan: Plan) -> None:
        """Go on from a journal."""

    @property
    def thorough(self) -> bool:
        """See TrainingFree."""
        return self.effort.is_thorough(self.dense.is_large)

    def held_out_loss(self, plan: Plan, leader: Judged | None = None) -> Judged:
        """What a whole plan loses on pairs that its recovery has not seen, see calibration.HeldOut."""
        halves = [list(self.dense.on_device(half)) for half in halved(self.judges)]
        folds = [(halves[0], halves[1]), (halves[1], halves[0])][: 2 if self.thorough else 1]
        if self._expected is None:
            self._expected = [torch.cat(through_dense(self.dense, judged_on)) for _, judged_on in folds]

        def loss(expected: Tensor, fitted_on: list[Inputs], judged_on: list[Inputs]) -> float:
            fitted_on = fitted_on if self.sequential else []
            found = through_compact(self.dense, plan, fitted_on, judged_on, recovers=self.recovers, each=self._tell)
            return comparison.feature_distance(expected, torch.cat(found)).item()

        known = zip(self._expected, folds, strict=True)
        return judged([partial(loss, expected, *fold) for expected, fold in known], leader)

    def _tell(self, index: int, layer: nn.Module) -> None:
        """Now and then how far a plan has come, below the bar of all plans."""
        depth = len(self.dense.model.layers)
        if (index + 1) % max(1, depth // 4) == 0:
            self.progress.say(f"layer {index + 1} of {depth}")

    def measure(self, plan: Plan) -> Any:
        raise NotImplementedError("a method with stages is not streamed")

    def save(self, state: State) -> None:
        """A plan was looked at."""
        if self.journal:
            self.journal.save(state.to_json())

    def build(self, plan: Plan) -> nn.Module:
        """The model of the plan that was found, without weights: they are made as they are written."""
        return self.dense.of_plan(plan).module

    def finish(self, state: State, model: nn.Module, progress: Progress) -> nn.Module:
        """Nothing is left to do."""
        return model


def gather_prices(
    dense: StreamedDense, batches: list[Batch], progress: Progress, *, weighted: bool, seed: int, searches: bool
) -> dict[scoring.Key, Tensor]:
    """The price of every unit of the decoder, see statistics.prices; none where nothing `searches`. Its Gram matrices are left
    in the spool, by the keys of the parts."""
    ready = [piece for batch in batches for piece in split(batch, PROBED)]
    inputs, model, depth = list(dense.on_device(ready)), dense.model, len(dense.model.layers)
    with progress.track("gathering activations, layer by layer", depth) as bar, torch.no_grad():
        calls = entering(dense, model, inputs)
        recorders = forward(dense, model, calls, inputs, bar.advance)
        slopes = draw_slopes(dense, model, calls, inputs, seed)
    found: dict[scoring.Key, Tensor] = {}
    with progress.track("pricing what can be removed, layer by layer", depth) as bar:
        for index in reversed(range(depth)):
            found |= price_layer(dense, model, index, calls, recorders, slopes, weighted, searches)
            bar.advance()
    return found


def entering(dense: StreamedDense, model: ModelOnDisk, inputs: Sequence[Inputs]) -> list[Call]:
    """What the first layer of the decoder is called with, for each batch."""
    return entering_calls(model.module, dense.decoder, inputs, dense.task.forward)


def forward(
    dense: StreamedDense,
    model: ModelOnDisk,
    calls: Sequence[Call],
    inputs: Sequence[Inputs],
    advance: Callable[[], None],
) -> list[scoring.Recorder]:
    """All calls through all layers; what enters each is put into the spool, and the token scores of each are recorded."""
    tower, recorders, now = dense.decoder, [scoring.Recorder(prompts=Prompts()) for _ in calls], 0

    def remember(index: int, paid: Tensor) -> None:
        recorders[now].scores[tower.name, index] = paid

    for recorder, given in zip(recorders, inputs, strict=True):
        assert recorder.prompts is not None  # just made
        recorder.prompts.read(model.module, (), given)
    with listening(model.module, tower, scoring.tower_layers(model.module, tower), remember) as prompts:
        for index, layer in enumerate(model.layers):
            with layer.filled() as module:
                for now, (call, given) in enumerate(zip(calls, inputs, strict=True)):
                    prompts.read(model.module, (), given)
                    dense.spool.put(("entering", index, now), call.hidden)
                    call.step(module, index)
            advance()
    return recorders


def draw_slopes(
    dense: StreamedDense, model: ModelOnDisk, calls: Sequence[Call], inputs: Sequence[Inputs], seed: int
) -> list[Tensor]:
    """The gradient of a drawn number (see calibration.probe) behind the last layer, (batch, tokens, dim) for each batch."""
    found: list[Tensor] = []
    for number, (call, given) in enumerate(zip(calls, inputs, strict=True)):
        with torch.enable_grad():
            last = call.hidden = call.hidden.detach().requires_grad_()
            features = read_features(dense, model, call, given)
            if not features.isfinite().all():
                said = f"{dense.source.name}: what it says of the calibration pairs is not finite."
                raise RefusedError(said, hint="config.json, weights and processor files must fit.")
            read = tuple(part.detach().requires_grad_() for part in (logits(dense, features.detach()), features))
            by_logits, by_features = torch.autograd.grad(probe(dense.task, drawn_by(seed, number), read), read)
        for first, rows in dense.weights.computed_pieces(dense.head):
            by_features += by_logits[:, first : first + len(rows)] @ rows
        found += torch.autograd.grad(features, last, by_features)
    return found


def price_layer(
    dense: StreamedDense,
    model: ModelOnDisk,
    index: int,
    calls: Sequence[Call],
    recorders: Sequence[scoring.Recorder],
    slopes: list[Tensor],
    weighted: bool,
    searches: bool,
) -> dict[scoring.Key, Tensor]:
    """One step of the pass back: prices of the parts of a layer; `slopes` behind the layer become those before it."""
    tower, found, pairs = dense.decoder, Statistics(precision=torch.float32), 0
    keys = {part.name: (tower.name, index, part.name) for part in tower.parts}
    with model.layers[index].filled() as layer:
        for number, (call, recorder) in enumerate(zip(calls, recorders, strict=True)):
            entered = dense.spool[("entering", index, number)].requires_grad_()
            dense.spool.drop(("entering", index, number))
            pairs += len(entered)
            with torch.enable_grad(), watching(layer, tower) as seen:
                call.hidden = entered
                call.step(layer, index)
            said = [seen[part.name].output for part in tower.parts]
            slopes[number], *heard = torch.autograd.grad(call.hidden, [entered, *said], slopes[number])
            call.hidden = entered.detach()
            for part, slope in zip(tower.parts, heard, strict=True):
                weights = scoring.weights_of(recorder, tower, dense.plan, keys[part.name], weighted)
                inner = scoring.in_batches(seen[part.name].inner.detach())
                found.add(keys[part.name], inner, weights, seen[part.name].output, slope)
            del seen, said, heard
        readers = [scoring.reader_of(layer, part) for part in tower.parts]
        read = [(reader.weight, reader.bias is not None) for reader in readers]
    found, result = found.over(pairs), {}
    for key, (weight, biased) in zip(keys.values(), read, strict=True):
        dense.spool.put(key, found.grams[key])
        if not searches:
            continue
        width = dense.plan.tower(tower.name).layers[index].parts[key[2]].width
        result[key] = prices_of_part(weight, biased, found, key, width)
    return result


def through_dense(dense: StreamedDense, inputs: Sequence[Inputs], advance: Callable[[], None] = lambda: None) -> list[Tensor]:
    """What the decisions of the dense model are made of, for each batch: (rows, dim) of the rows that the task keeps."""
    with torch.inference_mode():
        calls = entering(dense, dense.model, inputs)
        for index, layer in enumerate(dense.model.layers):
            with layer.filled() as module:
                for call in calls:
                    call.step(module, index)
            advance()
        return [read_features(dense, dense.model, call, given) for call, given in zip(calls, inputs, strict=True)]


def through_compact(
    dense: StreamedDense,
    plan: Plan,
    fitted_on: Sequence[Inputs],
    judged_on: Sequence[Inputs],
    *,
    recovers: bool,
    each: Each = leave,
) -> list[Tensor]:
    """The same of the model of a plan, recovered where it `recovers`, and refitted in sequence on the batches `fitted_on` if
    there are any (see sequential_refit). each: is given every layer when it is fitted, before the pairs that judge go through
    it."""
    tower, depth = dense.decoder, len(dense.model.layers)
    first = first_changed(tower, plan, dense.plan) if fitted_on else depth
    fitted_on = fitted_on if first < depth else []
    with torch.inference_mode():
        model = dense.of_plan(plan)
        whole, own = entering(dense, dense.model, fitted_on), entering(dense, model, fitted_on)
        judged = entering(dense, model, judged_on)
        for index, layer in enumerate(model.layers):
            root = dense.root(tower, index)
            with dense.model.layers[index].filled() as dense_layer:
                behind = step_watched(dense_layer, tower, index, whole)
                there: dict[str, Tensor] = {f"{root}.{name}": tensor for name, tensor in dense_layer.named_parameters()}
                state = dense.sliced(plan, tower.name, index, there, dense.spool.__getitem__ if recovers else None)
                del there
            with layer.filled({name.removeprefix(f"{root}."): tensor for name, tensor in state.items()}) as module:
                del state
                with left_once(module, [*own, *judged]):
                    if index >= first:
                        refit_layer(module, tower, index, own, behind)
                    else:
                        for call in own:
                            call.step(module, index)
                    each(index, module)
                    for call in judged:
                        call.step(module, index)
        return [read_features(dense, model, call, given) for call, given in zip(judged, judged_on, strict=True)]


def read_features(dense: StreamedDense, model: ModelOnDisk, call: Call, inputs: Inputs) -> Tensor:
    """Behind the last layer: what logits are made of, (rows, dim), at the tokens that are predicted, of which the task keeps
    some."""
    decoder: Any = model.module.get_submodule(dense.decoder.encoder)
    states: Tensor = put_back(call, decoder.norm(call.hidden))
    wanted = dense.place.predicted(inputs)
    return dense.task.subsample((states[:, :-1][wanted].float(),), len(wanted))[0]


def put_back(call: Call, states: Tensor) -> Tensor:
    """States where their tokens were, (batch, tokens, dim), zero where one has left; see DroppingDecoder."""
    selection = call.selection
    if selection is None or selection.index is None:
        return states
    if selection.valid is not None:
        states = states * selection.valid.unsqueeze(-1)
    index = selection.index.unsqueeze(-1).expand_as(states)
    return states.new_zeros(len(states), selection.tokens, states.shape[-1]).scatter(1, index, states)


def logits(dense: StreamedDense, features: Tensor) -> Tensor:
    """(rows, dim) -> (rows, words), the matrix read in pieces."""
    pieces = (features @ rows.T for _, rows in dense.weights.computed_pieces(dense.head))
    found = torch.cat(list(pieces), dim=-1)
    bias = getattr(dense.model.module.get_submodule(dense.place.head), "bias", None)
    return found if bias is None else found + bias


def outputs_of(dense: StreamedDense, features: Sequence[Tensor]) -> Outputs:
    """What the task judges, of the features of all batches, on the CPU: the matrix of the logits is read once."""
    whole = torch.cat(list(features))
    with torch.inference_mode():
        return logits(dense, whole).cpu(), whole.cpu()
