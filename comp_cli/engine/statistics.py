"""What a dense model shows of its parts on calibration pairs, once: Gram matrices of their channels, and how much the loss
rises where they err. Prices of removal and recovery are made of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from ..plan import Plan
from . import brain_surgeon, flops
from .recover import RIDGE, gram
from .scoring import Key, in_batches, reader_of, recording, tower_layers, weights_of


@dataclass
class Statistics:
    """Sums over all pairs. grams: sum_n w_n [x_n; 1][x_n; 1]^T of the channels of a part over all tokens n, (channels + 1,
    channels + 1), fp64. rises: the loss, in nats, that it would cost to first order in the error, squared, if all that a part
    says were replaced by its mean. energies: sum_n w_n ||o_n - mean||^2 of what it says."""

    grams: dict[Key, Tensor] = field(default_factory=dict)
    rises: dict[Key, float] = field(default_factory=dict)
    energies: dict[Key, float] = field(default_factory=dict)
    precision: torch.dtype = torch.float64  # that Gram matrices are summed in

    def add(self, key: Key, inputs: Tensor, weights: Tensor, said: Tensor | None = None, slope: Tensor | None = None) -> None:
        """One batch of a part: its channels (batch, tokens, channels), the weights of the tokens (batch, tokens), and where
        the loss was differentiated what the part said and the slopes there, (batch, tokens, dim) each."""
        product = gram(inputs, weights)
        if key in self.grams:
            self.grams[key] += product
        else:
            self.grams[key] = product.to(self.precision)
        if said is None or slope is None:
            return
        varied = _around_mean(in_batches(said.detach().float()), weights)
        rise = (in_batches(slope.float()) * varied).sum((1, 2)).square().sum()
        self.rises[key] = self.rises.get(key, 0.0) + float(rise)
        self.energies[key] = self.energies.get(key, 0.0) + float((weights * varied.square().sum(-1)).sum())

    def over(self, pairs: int) -> "Statistics":
        """The same with the rises a pair, of those summed over so many."""
        return replace(self, rises={key: rise / max(pairs, 1) for key, rise in self.rises.items()})


def collect(
    model: nn.Module,
    family: Family,
    plan: Plan,
    batches: Iterable[dict[str, Tensor]],
    run: Callable[[dict[str, Tensor]], Any],
    *,
    draw: Callable[[Any], Tensor] | None = None,
    weighted: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Statistics:
    """One pass over the batches, there and, with `draw`, back.

    run: runs the model over a batch. draw: makes of what it returned a number whose gradient is a draw from the square root of
    the loss's curvature (see `calibration.probe`); without it there are no `rises`. weighted: by the token weights of CIP
    (CoMP, Eq. 4 and 5), else all tokens alike.
    """
    found = Statistics()
    said: dict[Key, Tensor] = {}  # with `draw`, what every output projection says
    back = draw is not None
    with recording(model, family, plan) as recorder, torch.set_grad_enabled(back), _hearing(model, family, said, back):
        for batch in batches:
            read = run(batch)
            slopes: dict[Key, Tensor] = {}
            if draw:  # nothing reads what some layers say: the last of a tower whose features are those of an earlier one
                found_slopes = torch.autograd.grad(draw(read), list(said.values()), allow_unused=True, materialize_grads=True)
                slopes = dict(zip(said, found_slopes, strict=True))
            for key, inputs in recorder.inputs.items():
                weights = weights_of(recorder, family.tower(key[0]), plan, key, weighted)
                found.add(key, inputs, weights, said.get(key), slopes.get(key))
            advance()
    return found


@contextmanager
def _hearing(model: nn.Module, family: Family, said: dict[Key, Tensor], wanted: bool) -> Iterator[None]:
    """Keep in `said` what output projections say while the context is open, to be differentiated by, if it is wanted."""

    def remember(key: Key) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            said[key] = output if output.requires_grad else output.detach().requires_grad_()
            return said[key]

        return hook

    hooks = []
    try:
        for tower in family.towers if wanted else ():
            for index, layer in enumerate(tower_layers(model, tower)):
                for part in tower.parts:
                    reader = reader_of(layer, part)
                    hooks.append(reader.register_forward_hook(remember((tower.name, index, part.name))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _around_mean(output: Tensor, weights: Tensor) -> Tensor:
    """What a part says without its weighted mean, which the bias could say; padding, of weight 0, as zero. (batch, tokens,
    dim), (batch, tokens) -> (batch, tokens, dim)."""
    mean = torch.einsum("bnd,bn->d", output, weights) / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (output - mean) * (weights > 0).unsqueeze(-1)


def keys_of(family: Family, plan: Plan) -> list[Key]:
    """All parts of all layers."""
    return [
        (tower.name, index, part.name)
        for tower in plan.towers
        for index in range(len(tower.layers))
        for part in family.tower(tower.name).parts
    ]


def prices(
    model: nn.Module,
    family: Family,
    plan: Plan,
    found: Statistics,
    advance: Callable[[], None] = lambda: None,
    keys: Iterable[Key] | None = None,
    precision: torch.dtype = torch.float64,
) -> dict[Key, Tensor]:
    """The price of every unit of a dense model, (units,): what its removal adds to the loss by what it adds to the squared
    error of its part (see `brain_surgeon.removal_prices`), refit included. Comparable between parts. keys: of some parts
    only. precision: of the elimination."""
    result = {}
    for key in keys_of(family, plan) if keys is None else keys:
        name, index, part = key
        tower = family.tower(name)
        reader = reader_of(tower_layers(model, tower)[index], tower.part(part))
        width = plan.tower(name).layers[index].parts[part].width
        result[key] = prices_of_part(reader.weight, reader.bias is not None, found, key, width, precision)
        advance()
    return result


def prices_of_part(
    weight: Tensor, biased: bool, found: Statistics, key: Key, width: int, precision: torch.dtype = torch.float64
) -> Tensor:
    """The price of every unit of one part, (units,), see `prices`. weight: of its output projection, (outputs, channels), and
    whether that has a bias; width: channels of a unit."""
    hessian = brain_surgeon.hessian(found.grams[key], biased, RIDGE)
    price = brain_surgeon.removal_prices(weight.detach(), hessian, width, precision)
    return price.cpu() * (found.rises[key] / max(found.energies[key], 1e-30))


def even_prices(plan: Plan) -> dict[Key, Tensor]:
    """One price for all units, for who asks for sizes alone."""
    return {
        (tower.name, index, part): torch.ones(len(units.units))
        for tower in plan.towers
        for index, layer in enumerate(tower.layers)
        for part, units in layer.parts.items()
    }


def per_flops(prices: Mapping[Key, Tensor], plan: Plan, dense: Plan, ref: flops.Reference) -> dict[Key, Tensor]:
    """Prices of the units that a plan keeps, each per FLOPs that it has in the dense model: (kept units,) for each part."""
    result = {}
    for row in flops.count(dense, ref).layers:
        layer = plan.tower(row.tower).layers[row.layer]
        for part, cost in row.parts.items():
            key = (row.tower, row.layer, part)
            result[key] = prices[key][list(layer.kept(part))] * (len(prices[key]) / cost)
    return result
