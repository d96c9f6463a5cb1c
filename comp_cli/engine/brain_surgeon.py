"""The price of removing a unit when the rest is refitted: the structured optimal brain surgeon. Pure functions of tensors.

A projection W reads channels x. To take unit S away and refit the others adds to  sum_n w_n ||W x_n - W' x_n||^2  exactly
tr(W_S ((H^-1)_SS)^-1 W_S^T)  with  H = sum_n w_n x_n x_n^T + ridge I  (optimal brain surgeon, Hassibi and Stork 1993; for
heads and channels ZipLM, arXiv 2302.04089; SlimGPT, arXiv 2412.18110). What is left is priced anew after every removal.
"""

import torch
from torch import Tensor

ROWS = 256  # that are moved at once
BLOCK = 64  # removed channels whose updates are applied to whole matrices at once


def removal_prices(weight: Tensor, hessian: Tensor, width: int = 1, precision: torch.dtype = torch.float64) -> Tensor:
    """Greedy elimination: the cheapest unit goes, the rest is refitted and priced anew, until none is left.

    weight: (outputs, units * width). hessian: symmetric and positive definite, (units * width, units * width); see `hessian`.
    precision: of the elimination; the first inverse is of fp64. Returns (units,) in fp64: what the removal of a unit added to
    the squared error when it went, but never less than what one that went before it did, so that a threshold takes them in the
    order of the elimination.

    With P = H^-1 and Q = W^T W, one step takes S = LL^T of P_SS out of both: F = P_:S L^-T, P -= F F^T, and with
    Z = Q_:S L^-T - F D / 2, D = L^-1 Q_SS L^-T, Q -= Z F^T + F Z^T; the price is tr(D). Updates of whole matrices wait until
    there are `BLOCK` columns of them: O(channels^3) in few large matrix products.
    """
    units = weight.shape[1] // width
    weight = weight.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double())).to(precision).contiguous()
    products = weight.T.to(precision) @ weight.to(precision)
    prices = weight.new_zeros(units)
    alive = torch.arange(units, device=weight.device)  # those that `inverse` and `products` still hold
    highest = 0.0
    while len(alive):
        steps = min(len(alive), max(1, BLOCK // width))
        taken, found, removed, shifts = _eliminate(inverse, products, width, steps)
        prices[alive[taken]] = found.double().clamp(min=highest).cummax(0).values
        highest = float(prices[alive[taken[-1]]])
        left = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        left[taken] = False
        alive, rows = alive[left], left.repeat_interleave(width)
        removed, shifts = removed[rows], shifts[rows]
        inverse = _without(inverse, rows).addmm_(removed, removed.T, alpha=-1)
        products = _without(products, rows).addmm_(shifts, removed.T, alpha=-1).addmm_(removed, shifts.T, alpha=-1)
    return prices


def _without(matrix: Tensor, stay: Tensor) -> Tensor:
    """The rows and columns of a square matrix that stay, (channels,) booleans, moved together in the memory of the matrix: the
    largest are as large as all else together. Rows move to where only rows before them were."""
    left = stay.nonzero()[:, 0]
    found = matrix.view(-1)[: len(left) ** 2].view(len(left), len(left))
    for first in range(0, len(left), ROWS):
        rows = left[first : first + ROWS]
        found[first : first + ROWS] = matrix[rows][:, left]
    return found


def hessian(found: Tensor, has_bias: bool, ridge: float) -> Tensor:
    """H of the channels, the bias refitted, of a Gram matrix with a constant last channel: (channels + 1, channels + 1) ->
    (channels, channels) in fp64. The bias, which never goes, is taken out by a Schur complement. ridge: see `recover.refit`."""
    shrink = ridge * found.diagonal().double().mean()
    own, constant = found[:-1, :-1].to(torch.float64, copy=True), found[:-1, -1:].double()
    if has_bias:
        own -= constant @ constant.T / (found[-1, -1].double() + shrink)
    own.diagonal().add_(shrink)
    return own


def _eliminate(inverse: Tensor, products: Tensor, width: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next units to go: their indices and prices, (steps,), and the columns F and Z of what their removal takes from
    `inverse` (F F^T) and from `products` (Z F^T + F Z^T), both (channels, steps * width)."""
    channels, units = len(inverse), len(inverse) // width
    removed, shifts = (inverse.new_zeros(channels, steps * width) for _ in range(2))
    unit = torch.arange(units, device=inverse.device)
    own = inverse.view(units, width, units, width)[unit, :, unit]  # the diagonal blocks, (units, width, width)
    energy = products.view(units, width, units, width)[unit, :, unit]
    gone = torch.zeros(units, dtype=torch.bool, device=inverse.device)
    taken, prices = [], []
    for step in range(steps):
        root = torch.linalg.cholesky(own)
        price = torch.cholesky_solve(energy, root).diagonal(dim1=1, dim2=2).sum(-1)
        cheapest = int(price.masked_fill(gone, torch.inf).argmin())
        taken.append(cheapest)
        prices.append(price[cheapest])
        here = slice(cheapest * width, (cheapest + 1) * width)
        lower = root[cheapest]
        column = inverse[:, here] - removed @ removed[here].T
        factor = torch.linalg.solve_triangular(lower, column.T, upper=False).T
        column = products[:, here] - shifts @ removed[here].T - removed @ shifts[here].T
        cross = torch.linalg.solve_triangular(lower, column.T, upper=False).T
        shift = cross - factor @ torch.linalg.solve_triangular(lower, cross[here], upper=False) / 2
        place = slice(step * width, (step + 1) * width)
        removed[:, place], shifts[:, place] = factor, shift
        factor, shift = (each.view(units, width, width) for each in (factor, shift))
        own = own - factor @ factor.mT
        crossed = shift @ factor.mT
        energy = energy - crossed - crossed.mT
        gone[cheapest] = True
        own[gone] = torch.eye(width, dtype=own.dtype, device=own.device)
    return torch.tensor(taken, device=inverse.device), torch.stack(prices), removed, shifts
