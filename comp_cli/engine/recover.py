"""Closed-form recovery: after a removal, the output projections are fitted anew to say what the dense ones said.

For each part with inner activations x (constant 1 appended for the bias) and output projection W, minimise over the kept
channels K  sum_n w_n ||W x_n - W' x_n[K]||^2 + ridge ||W' - W[:, K]||^2,  which gives with the weighted Gram matrix
G = sum_n w_n x_n x_n^T:  W' = (W G[:, K] + ridge W[:, K]) (G[K, K] + ridge I)^-1.  G is gathered once, on the dense model:
every plan is recovered from it.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..families import Family
from ..plan import Plan, Units
from .scoring import Key
from .slicing import unit_channels

RIDGE = 1e-3  # times the mean of the diagonal


def gram(activations: Tensor, weights: Tensor) -> Tensor:
    """sum_n w_n [x_n; 1] [x_n; 1]^T. (batch, tokens, channels), (batch, tokens) -> (channels + 1, channels + 1)."""
    x = activations.flatten(0, 1).float()
    used = weights.flatten() > 0
    x, w = x[used], weights.flatten()[used].float().sqrt().unsqueeze(1)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) * w
    return x.T @ x


def refit(
    weight: Tensor, bias: Tensor | None, found: Tensor, kept: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, kept) and bias (outputs,) that best replace a dense (outputs, channels) one on the kept channels.

    A projection without bias gets none: the constant column of the Gram matrix `found` is left out.
    """
    channels = weight.shape[1]
    if bias is None:
        columns, whole, found = kept.to(found.device), weight.double(), found[:channels, :channels]
    else:
        columns = torch.cat([kept, torch.tensor([channels])]).to(found.device)
        whole = torch.cat([weight, bias.unsqueeze(1)], dim=1).double()
    cross = whole @ found[:, columns].double()
    now = whole[:, columns]
    del whole  # of the widest part each of these is as large as a layer
    # The ridge pulls towards the plain slice, not towards zero: nothing pruned, nothing changed.
    fitted = ridge_fit(found[columns][:, columns].double(), cross.T, now, ridge)
    if bias is None:
        return fitted.to(weight.dtype).contiguous(), None
    return fitted[:, :-1].to(weight.dtype).contiguous(), fitted[:, -1].to(bias.dtype).contiguous()


def ridge_fit(inner: Tensor, cross: Tensor, now: Tensor, ridge: float) -> Tensor:
    """The weights (outputs, columns) nearest to a target in least squares, pulled towards those that are there, `now`.

    inner: Gram matrix of what is read, (columns, columns); cross: its products with the target, (columns, outputs); all in
    fp64. Both are overwritten, for of the widest part each is as large as a layer. ridge: times the mean of the Gram matrix's
    diagonal.
    """
    shrink = ridge * inner.diagonal().mean().clamp(min=1e-30)  # where all that is read is zero
    inner.diagonal().add_(shrink)
    lower = inner.T  # in the order of columns, in which it is factored where it lies
    torch.linalg.cholesky(lower, out=lower)  # positive definite by the ridge
    return torch.cholesky_solve(cross.addcmul_(shrink, now.T), lower).T


Fitted = dict[Key, tuple[Tensor, dict[str, Tensor]]]  # what was kept last, and the fit


def recover(
    sliced: dict[str, Tensor],
    dense: Mapping[str, Tensor],
    family: Family,
    plan: Plan,
    grams: Mapping[Key, Tensor],
    fitted: Fitted,
) -> dict[str, Tensor]:
    """The sliced weights with refitted output projections. Parts that kept everything stay as they are.

    `fitted` remembers the last fit of each part, which is taken again where the plan kept the same.
    """
    recovered = dict(sliced)
    for tower_plan in plan.towers:
        tower = family.tower(tower_plan.name)
        for index, layer in enumerate(tower_plan.layers):
            for part in tower.parts:
                name = f"{tower.encoder}.{tower.layers}.{index}.{part.column}"
                key, units = (tower.name, index, part.name), layer.parts[part.name]
                kept = unit_channels(units.units, units.width)
                if key not in fitted or not torch.equal(fitted[key][0], kept):
                    fitted[key] = kept, recover_part(dense, name, units, partial(grams.__getitem__, key))
                recovered |= fitted[key][1]
    return recovered


def recover_part(dense: Mapping[str, Tensor], name: str, units: Units, found: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The refitted weight, and bias if it has one, of the output projection `name` on some units; none where it keeps all.
    found: the Gram matrix of its channels, asked for where it is needed."""
    weight, bias = dense[f"{name}.weight"], dense.get(f"{name}.bias")
    kept = unit_channels(units.units, units.width)
    if len(kept) == weight.shape[1]:
        return {}
    fitted, shift = refit(weight, bias, found(), kept)
    return {f"{name}.weight": fitted} | ({} if shift is None else {f"{name}.bias": shift})
