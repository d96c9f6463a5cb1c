"""Recovery in sequence: from the first layer on, every output projection is fitted to what the dense model's residual stream
holds behind its part, so that each part makes good what those before it lost, pruned tokens included.

For a part with inner activations x and residual h in the compact model, and the dense model's stream d behind the part, at
the tokens that are left:  min sum_n ||d_n - h_n - W' x_n||^2 + ridge ||W' - W||^2. One layer after the other, all pairs at
once, so the two models go through the pairs together and no activations of a whole model are held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Part, Tower
from ..plan import Plan
from ..runtime.modeling_comp import CACHES, LAYOUT_DEFAULTS, CompactAttention, PreNormLayer, TokenState, unmasked
from ..runtime.token_selection import Selection, Stage
from .recover import ridge_fit
from .scoring import reader_of, tower_layers

# Times the mean of the Gram matrix's diagonal. Larger than in `recover`: targets hold what no channel of the part can say.
RIDGE = 3e-2
HELD = 2**27  # bytes of inner activations that are kept while a layer is refitted
Run = Callable[[nn.Module, dict[str, Tensor]], Any]
Sums = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def refit_in_sequence(
    compact: nn.Module,
    dense: nn.Module,
    family: Family,
    plan: Plan,
    dense_plan: Plan,
    batches: Sequence[dict[str, Tensor]],
    run: Run,
    advance: Callable[[], None] = lambda: None,
    summed: Sums = dict,
    streams: "Streams | None" = None,
) -> None:
    """Refit the output projections of `compact` in place (weights are replaced, not written into: some are the dense model's).

    batches: calibration pairs as model inputs. run: runs a model over one of them. Layers before the first one that the plan
    changes stay as they are, and so do stock towers whose norms nobody described. `advance` hears of every layer.
    `summed`: where the batches are some of those that several processes share, the sums over all of them. streams: of the dense
    model on the same batches, where they are looked at for several plans.
    """
    streams = streams or Streams(dense, batches, run)
    passed: list[tuple[Tower, list[Call]]] = []  # the compact model's
    changed: set[str] = set()  # streams whose tokens are no longer what they were
    with torch.inference_mode():
        for tower in family.towers:
            reads = {part.reads for part in tower.parts if part.reads}
            first = 0 if reads & changed else first_changed(tower, plan, dense_plan)
            described = tower.order != "stock" or tower.norms is not None
            if described and first < len(plan.tower(tower.name).layers):
                with answered(compact, passed):
                    own = entering_calls(compact, tower, batches, run)
                _refit_tower(compact, tower, first, own, streams.behind(tower), advance, summed)
                passed.append((tower, own))
                changed |= {stream.name for stream in tower.streams}


def first_changed(tower: Tower, plan: Plan, dense: Plan) -> int:
    """The first layer of a tower that keeps less than the dense model's, or that tokens leave before; the number of layers
    where there is none."""
    own = plan.tower(tower.name).layers
    pairs = zip(own, dense.tower(tower.name).layers, strict=True)
    first = next((index for index, (kept, all_) in enumerate(pairs) if kept != all_), len(own))
    return min(first, plan.stages[0].layer) if tower.writes and plan.stages else first


@dataclass
class Call:
    """What a layer is called with, over and over: the pairs of a batch on their way through a tower."""

    hidden: Tensor  # (batch, tokens, dim)
    rest: tuple[Any, ...]
    options: dict[str, Any]
    encoder: Any  # the module that runs the layers
    around: dict[str, Any]  # what it was called with itself

    def step(self, layer: nn.Module, index: int, said: Tensor | None = None) -> None:
        """Behind a layer, with what the encoder adds there (Qwen3-VL: features of deeper layers of the vision tower). said:
        what the layer says, where that is known."""
        self.hidden = self.run(layer) if said is None else said
        deep = self.around.get("deepstack_visual_embeds") or ()
        if index < len(deep):
            self.encoder.comp_current = self.selection
            self.hidden = self.encoder._deepstack_process(self.hidden, self.around["visual_pos_masks"], deep[index])
            self.encoder.comp_current = None

    def drop(self, stage: Stage) -> None:
        """Let image tokens leave before a layer."""
        if self.selection is not None and self.selection.images is not None:
            self.hidden = self.selection.drop(stage, self.hidden)

    def run(self, layer: nn.Module) -> Tensor:
        found: Tensor = layer(self.hidden, *self.rest, **self.options)
        return found

    @property
    def token_state(self) -> TokenState | None:
        found: TokenState | None = self.options.get("token_state")
        return found

    @property
    def selection(self) -> Selection | None:
        found: Selection | None = self.options.get("selection")
        return found

    def kept_before(self, layer: int) -> Tensor | None:
        """Which of the tokens that entered the tower are left before a layer, (batch, left); None for all."""
        if self.selection is not None:
            return self.selection.index
        return None if self.token_state is None else self.token_state.positions(before=layer)

    def valid(self, seen: dict[str, Any], index: int, entry: bool) -> Tensor | None:
        """Which tokens that a part is given are no padding, (batch, tokens); None for all."""
        mask: Tensor | None = seen["mask"]
        if not entry and self.token_state is not None:
            mask = self.token_state.mask_of(index + 1, mask, self.hidden.device)
        return None if mask is None else unmasked(mask)[:, 0, -1]


class _Reached(Exception):
    """A model has come as far as it is needed."""


def entering_calls(model: nn.Module, tower: Tower, batches: Sequence[dict[str, Tensor]], run: Run) -> list[Call]:
    """What the first layer of a tower is called with for each batch. Stock loops call all layers alike; without a cache,
    because a layer is run several times."""
    calls: list[Call] = []
    encoder, layers = model.get_submodule(tower.encoder), tower_layers(model, tower)
    around: dict[str, Any] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = {name: value for name, value in options.items() if name not in CACHES}
        hidden = args[0] if args else options.pop("hidden_states")
        rest = tuple(None if _is_cache(value) else value for value in args[1:])
        calls.append(Call(hidden, rest, options, encoder, dict(around)))
        raise _Reached

    def remember_around(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        around.update(options)

    first = layers[0]
    if hasattr(first, "comp_stage"):  # a DroppingLayer, which would drop tokens before its hooks hear of it
        layers[0] = nn.Identity()
    hooks = [
        layers[0].register_forward_pre_hook(remember, with_kwargs=True),
        encoder.register_forward_pre_hook(remember_around, with_kwargs=True),
    ]
    try:
        for batch in batches:
            try:
                run(model, batch)
            except _Reached:
                pass
    finally:
        layers[0] = first
        for hook in hooks:
            hook.remove()
    return calls


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


class Streams:
    """The dense model's residual streams on some batches, behind every part of every layer. They are made layer by layer; those
    of a tower are kept for the next plan while they take no more than `room` bytes."""

    def __init__(self, dense: nn.Module, batches: Sequence[dict[str, Tensor]], run: Run, room: int = 0):
        self.dense, self.batches, self.run, self.room = dense, batches, run, room
        self.kept: dict[str, list[list[dict[str, Tensor]]]] = {}
        self.passed: list[tuple[Tower, list[Call]]] = []

    def behind(self, tower: Tower) -> Iterator[list[dict[str, Tensor]]]:
        """Layer by layer, of each batch part -> (batch, tokens, dim)."""
        if tower.name in self.kept:
            yield from self.kept[tower.name]
            return
        with answered(self.dense, self.passed):
            calls = entering_calls(self.dense, tower, self.batches, self.run)
        found: list[list[dict[str, Tensor]]] = []
        for index, layer in enumerate(tower_layers(self.dense, tower)):
            behind = step_watched(layer, tower, index, calls)
            self.room -= sum(stream.nbytes for each in behind for stream in each.values())
            found = [*found, behind] if self.room >= 0 else []
            yield behind
        if found:
            self.kept[tower.name] = found
        if tower.name not in {known.name for known, _ in self.passed}:
            self.passed.append((tower, calls))

    def taking_turns(self, other: "Streams") -> "Streams":
        """Those of the batches of both, one of these and one of the others in turn."""

        def in_turn(own: Sequence[Any], others: Sequence[Any]) -> list[Any]:
            return [each for pair in zip(own, others, strict=True) for each in pair]

        joined = Streams(self.dense, in_turn(self.batches, other.batches), self.run, self.room + other.room)
        for name in self.kept.keys() & other.kept.keys():
            joined.kept[name] = [in_turn(*layers) for layers in zip(self.kept[name], other.kept[name], strict=True)]
        for (tower, calls), (same, others) in zip(self.passed, other.passed, strict=False):
            if tower.name == same.name:
                joined.passed.append((tower, in_turn(calls, others)))
        return joined


class _Answer(nn.Module):
    """In the place of the last layer of a tower that batches went through: says of the present one what it said then."""

    def __init__(self, calls: Sequence[Call]):
        super().__init__()
        self.calls = iter(calls)

    def forward(self, *args: Any, token_state: TokenState | None = None, **options: Any) -> Tensor:
        call = next(self.calls)
        if token_state is not None and call.token_state is not None:
            token_state.masks |= call.token_state.masks
            token_state.kept |= call.token_state.kept
        return call.hidden


class _Pass(nn.Module):
    """In the place of the other layers."""

    def forward(self, *args: Any, **options: Any) -> Tensor:
        hidden: Tensor = args[0] if args else options["hidden_states"]
        return hidden


@contextmanager
def answered(model: nn.Module, passed: Sequence[tuple[Tower, Sequence[Call]]]) -> Iterator[None]:
    """While the context is open, the same batches, in their order, are not taken through the layers of towers that they went
    through: what came out is known. Stock towers, which say more than their last layer does, run as ever."""
    replaced = []
    try:
        for tower, calls in passed:
            layers = tower_layers(model, tower)
            if tower.order == "stock":
                continue
            replaced.append((layers, list(layers)))
            for index in range(len(layers)):
                layers[index] = _Answer(calls) if index == len(layers) - 1 else _Pass()
        yield
    finally:
        for layers, own in replaced:
            for index, layer in enumerate(own):
                layers[index] = layer


def _refit_tower(
    compact: nn.Module,
    tower: Tower,
    first: int,
    own: Sequence[Call],
    streams: Iterable[list[dict[str, Tensor]]],
    advance: Callable[[], None],
    summed: Sums,
) -> None:
    for index, (layer, behind) in enumerate(zip(tower_layers(compact, tower), streams, strict=True)):
        with left_once(layer, own):
            if index >= first:
                refit_layer(layer, tower, index, own, behind, summed)
            else:
                for call in own:
                    call.step(layer, index)
        advance()


def step_watched(layer: nn.Module, tower: Tower, index: int, calls: Sequence[Call]) -> list[dict[str, Tensor]]:
    """Calls go through a layer of the dense model; of each the residual stream behind every part, (batch, tokens, dim)."""
    behind = []
    with watching(layer, tower) as seen:
        for call in calls:
            call.step(layer, index)
            behind.append({part.name: seen[part.name].stream for part in tower.parts})
    return behind


@contextmanager
def left_once(layer: nn.Module, calls: Sequence[Call]) -> Iterator[None]:
    """Let the image tokens of all calls leave that leave before a layer; while the context is open, it may run often, and none
    leaves again."""
    dropping: Any = layer  # a DroppingLayer, or a layer before which nothing leaves
    stage: Stage | None = getattr(layer, "comp_stage", None)
    if stage is None:
        yield
        return
    for call in calls:
        call.drop(stage)
    dropping.comp_stage = None
    try:
        yield
    finally:
        dropping.comp_stage = stage


def refit_layer(
    layer: nn.Module,
    tower: Tower,
    index: int,
    calls: Sequence[Call],
    behind: Sequence[Mapping[str, Tensor]],
    summed: Sums = dict,
) -> None:
    """Refit the output projections of a layer, one part after the other, to the streams of the dense model behind them; then
    the calls go through it.

    Behind the last part of a layer of comp's own, pre-norm, is what it says: there the projection alone runs again, of calls
    whose inner activations fit in HELD.
    """
    held: dict[int, tuple[Tensor, Tensor]] = {}  # number of a call -> residual and inner activations of the last part
    last, room = tower.parts[-1] if isinstance(layer, PreNormLayer) else None, HELD
    with attended_once(layer, tower) as begin:
        for part in tower.parts:
            fit = Fit(reader_of(layer, part))
            entry = part is tower.self_attention  # tokens go behind it
            with watching(layer, tower, last=part) as seen:
                for number, (own, streams) in enumerate(zip(calls, behind, strict=True)):
                    begin(number)
                    try:
                        own.run(layer)
                    except _Reached:
                        pass
                    kept, valid = own.kept_before(index + (0 if entry else 1)), own.valid(seen, index, entry)
                    found = seen[part.name]
                    fit.add(found.inner, counterparts(streams[part.name], kept, found.inner.shape[1]) - found.residual, valid)
                    if part is last and (room := room - found.inner.nbytes) >= 0:
                        held[number] = found.residual, found.inner
            fit.replace(summed)
        for number, own in enumerate(calls):
            begin(number)
            known = held.pop(number, None)
            own.step(layer, index, known and known[0] + reader_of(layer, tower.parts[-1])(known[1]))


@contextmanager
def attended_once(layer: nn.Module, tower: Tower) -> Iterator[Callable[[int], None]]:
    """While the context is open, the attentions of comp's runtime say again what they said to a call first: what is fitted
    lies behind them, and parts are fitted in their order. Yielded is who hears the number of the call that begins."""
    found = (layer.get_submodule(part.module) for part in tower.parts if part.is_attention)
    attentions = [module for module in found if isinstance(module, CompactAttention)]
    said: dict[tuple[int, CompactAttention], tuple[Tensor, Tensor | None]] = {}
    current = 0

    def begin(number: int) -> None:
        nonlocal current
        current = number

    def remembering(attention: CompactAttention) -> Callable[..., tuple[Tensor, Tensor | None]]:
        attend = attention.attend

        def again(*args: Any) -> tuple[Tensor, Tensor | None]:
            if (current, attention) not in said:
                said[current, attention] = attend(*args)
            return said[current, attention]

        return again

    try:
        for attention in attentions:
            attention.__dict__["attend"] = remembering(attention)
        yield begin
    finally:
        for attention in attentions:
            del attention.__dict__["attend"]


@dataclass
class Seen:
    """Of one part in one call of its layer: what its output projection reads, (batch, tokens, channels), what is added to what
    it says, (batch, tokens, dim), and what it says."""

    residual: Tensor = field(init=False)
    inner: Tensor = field(init=False)
    output: Tensor = field(init=False)

    @property
    def stream(self) -> Tensor:
        return self.residual + self.output


@contextmanager
def watching(layer: nn.Module, tower: Tower, last: Part | None = None) -> Iterator[dict[str, Any]]:
    """What goes through the parts of a layer while the context is open, part -> Seen, and "mask" -> what its self-attention is
    given. The layer is left (_Reached) when the output projection of `last` is about to run."""
    seen: dict[str, Any] = {part.name: Seen() for part in tower.parts}
    hooks = []

    def remember(part: Part, name: str, place: int = 0) -> Callable[..., None]:
        return lambda module, args: setattr(seen[part.name], name, args[place])

    def remember_inner(part: Part) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[part.name].inner = args[0]
            if part is last:
                raise _Reached

        return hook

    def remember_output(part: Part) -> Callable[..., None]:
        return lambda module, args, output: setattr(seen[part.name], "output", output)

    def remember_mask(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen["mask"] = args[1] if len(args) > 1 else options.get("attention_mask")

    try:
        for part in tower.parts:
            if tower.order != "post_norm":  # the norm before the part reads the residual stream
                norm = (tower.norms or LAYOUT_DEFAULTS["norms"])[0 if part.is_attention else 1]
                hooks.append(layer.get_submodule(norm).register_forward_pre_hook(remember(part, "residual")))
            else:  # the module around the projection is given the stream, to add and to normalise
                around = layer.get_submodule(part.column.rpartition(".")[0])
                hooks.append(around.register_forward_pre_hook(remember(part, "residual", 1)))
            reader = reader_of(layer, part)
            hooks.append(reader.register_forward_pre_hook(remember_inner(part)))
            hooks.append(reader.register_forward_hook(remember_output(part)))
        attention = layer.get_submodule(tower.self_attention.module)
        hooks.append(attention.register_forward_pre_hook(remember_mask, with_kwargs=True))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def counterparts(stream: Tensor, kept: Tensor | None, tokens: int) -> Tensor:
    """What the dense model holds at the tokens that are left: (batch, all, dim), (batch, kept) -> (batch, tokens, dim).

    Where one more is left than were kept, it stands for all others: its counterpart is their mean.
    """
    if kept is None:
        return stream
    found = stream.gather(1, kept.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))
    if tokens == kept.shape[1]:
        return found
    gone = stream.new_ones(stream.shape[:2]).scatter(1, kept, 0.0)
    mean = torch.einsum("bnd,bn->bd", stream, gone / gone.sum(1, keepdim=True))
    return torch.cat([found, mean.unsqueeze(1)], dim=1)


class Fit:
    """The least squares of one output projection, gathered batch by batch."""

    def __init__(self, reader: nn.Linear):
        self.reader = reader
        # "gram", (channels + 1, channels + 1), without bias (channels, channels), and "cross", the same rows, (..., outputs):
        # fp64, of products in fp32; empty where no pair was seen.
        self.sums: dict[str, Tensor] = {}

    def add(self, inner: Tensor, target: Tensor, valid: Tensor | None) -> None:
        """(batch, tokens, channels), (batch, tokens, outputs), and which of these tokens are no padding, (batch or 1, tokens),
        None for all."""
        rows, wanted = inner.flatten(0, 1).float(), target.flatten(0, 1).float()
        if valid is not None:
            counts = valid.expand(inner.shape[:2]).flatten()
            rows, wanted = rows[counts], wanted[counts]
        if self.reader.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        for name, product in ("gram", rows.T @ rows), ("cross", rows.T @ wanted):
            if name in self.sums:  # in place: of the widest part each of these is as large as a layer
                self.sums[name] += product
            else:
                self.sums[name] = product.double()

    def replace(self, summed: Sums) -> None:
        """Give the projection the weights that fit."""
        reader, channels, sums = self.reader, self.reader.in_features, summed(self.sums)
        now = reader.weight if reader.bias is None else torch.cat([reader.weight, reader.bias.unsqueeze(1)], dim=1)
        found = ridge_fit(sums["gram"], sums["cross"], now.double(), RIDGE)
        with torch.inference_mode(False):  # what is made under it could not be trained
            found = found.clone().to(reader.weight.dtype)
            reader.weight = nn.Parameter(found[:, :channels].contiguous(), requires_grad=False)
            if reader.bias is not None:
                reader.bias = nn.Parameter(found[:, channels].contiguous(), requires_grad=False)
