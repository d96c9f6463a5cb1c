"""Which image tokens stay: the rules of token pruning around and inside a language model, as pure functions.

This file ships beside compact checkpoints and needs torch only. A rule looks at a `View`, one row per image, padded to the
most tokens, and makes a `Choice`. All ranking is in fp32 and stable, the lower index first; what happens to an image depends
neither on the other rows nor on padding. No rule asks a tensor for a Python number: how many tokens stay is given (`keep`).

Every rule has its source in its docstring, and where it departs from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CUTOFF = 8.0  # of densities in `vic`, for the keys of CLIP ViT-L (ViTCoP's code)
NEAR = 0.6  # how far a parent may be in `vic`, of the side of the image (ViTCoP's code)
TINY = 1e-6
TIES = 2.0**8  # what differs by less than a part of so many is equal: two tokens that are alike cover one another equally


@dataclass
class View:
    """What a rule sees of a stage: I images of a batch, padded to n tokens, each with the T text tokens of its sample."""

    valid: Tensor  # (I, n) bool: which tokens are real
    states: Tensor  # (I, n, D): what enters the layer (before layer 0: projected features)
    positions: Tensor  # (I, n) int: index of each token among the image's first tokens, in raster order
    keys: Tensor | None = None  # (I, n, G, head_dim): of the layer before, before RoPE, key-value heads kept apart
    class_attention: Tensor | None = None  # (I, n): what [CLS] of the vision tower pays to each patch, summed over heads
    tower_keys: Tensor | None = None  # (I, n, d): keys of that tower layer, heads concatenated
    labels: Tensor | None = None  # (I, n) int: cluster of each token, from an earlier stage
    weights: Tensor | None = None  # (I, n): how many tokens each stands for since an earlier stage; None: for itself
    text_states: Tensor | None = None  # (I, T, D): of the text tokens of the image's sample
    text_valid: Tensor | None = None  # (I, T) bool; the last True of a row is the last instruction token
    text_attention: Tensor | None = None  # (I, T, n): attention of the layer before, from text to image tokens, mean over heads
    last_attention: Tensor | None = None  # (I, n): the same of the last instruction token alone
    grid: Tensor | None = (
        None  # (I, 2) int: rows and columns of the image's first tokens, 0 where not known; None: see `grid_of`
    )


@dataclass
class Choice:
    """What a rule decided."""

    kept: Tensor  # (I, n) bool: min(keep, tokens of the image) of each row, valid ones only
    states: Tensor | None = None  # (I, n, D): of kept tokens, where some were merged; None: as they were
    labels: Tensor | None = None  # (I, n) int, for later stages; None: as they were
    weights: Tensor | None = None  # (I, n): how many tokens each kept one stands for, in attention; None: as it was


@dataclass(frozen=True)
class StageRule:
    """A rule, and what has to be computed for it.

    needs: "keys", "class" (class_attention and tower_keys), "text" (text_states and text_valid), "attention" (text_attention
    and text_valid), "last" (last_attention). Settings may add one, see `needs_of`. weighs: whether it says how many tokens each
    kept one stands for, which attention has to know from there on.
    """

    choose: Callable[..., Choice]  # (view, keep: list[int], **settings)
    needs: frozenset[str] = frozenset()
    weighs: bool = False


# Parts of several rules


def ranked(scores: Tensor, valid: Tensor, keep: list[int]) -> Tensor:
    """(I, n) scores -> (I, n) bool: the `keep` highest of each row, the lower index first where they tie."""
    scores = scores.float().clamp(min=torch.finfo(torch.float32).min).masked_fill(~valid, -torch.inf)
    return (_ranks(-scores) < _column(keep, scores)) & valid


def gathered(kept: Tensor, most: int) -> Tensor:
    """(I, n) bool -> (I, most) int: where the kept tokens are, in their order, then others."""
    return (~kept).byte().argsort(dim=-1, stable=True)[:, :most]


def of_tokens(values: Tensor, index: Tensor) -> Tensor:
    """(I, n, D) and (I, m) -> (I, m, D)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[-1]))


def cosines(features: Tensor) -> Tensor:
    """(I, n, D) -> (I, n, n): cosine of each pair, fp32."""
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def text_relevance(view: View) -> Tensor:
    """(I, n): cosine of each image token's state with the mean state of the text."""
    states, valid = _given(view.text_states, "text_states").float(), _given(view.text_valid, "text_valid")[:, :, None]
    mean = states.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)
    return F.cosine_similarity(view.states.float(), mean[:, None], dim=-1)


def grid_of(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns of each image and whether they are known, (I, 1) each.

    Where the view does not say, an image that has all of its first tokens and a square number of them is a square; of any other
    nothing is known.
    """
    if view.grid is not None:
        rows, columns = view.grid.long().split(1, dim=-1)
        return rows.clamp(min=1), columns.clamp(min=1), rows * columns > 0
    tokens = view.valid.sum(-1, keepdim=True)
    whole = view.positions.masked_fill(~view.valid, -1).amax(-1, keepdim=True) + 1 == tokens
    side = tokens.float().sqrt().round().long().clamp(min=1)
    return side, side, whole & (side * side == tokens)


def merged(view: View, together: Tensor, keep: list[int], doubled: bool = False) -> Choice:
    """Groups of tokens become one token each, their mean, where the (lower) median member is.

    Args:
        together: (I, n, n) bool, symmetric: which valid tokens are of one group; `keep` groups in each image.
        doubled: the median member's own state is added to the mean.
    """
    index = _places(view.valid)
    earlier = (together & (index[:, None] < index[:, :, None])).sum(-1)
    sizes = together.sum(-1)
    kept = (earlier == (sizes - 1) // 2) & view.valid
    at = gathered(kept, _most(keep, view))
    states = view.states.float().masked_fill(~view.valid[:, :, None], 0)
    rows, count = of_tokens(together.float(), at), sizes.gather(1, at)[:, :, None]
    mean = (rows @ states) / count.clamp(min=1)
    own = of_tokens(view.states, at)
    mean = torch.where(count > 1, mean + own.float() if doubled else mean, own.float()).to(own.dtype)
    return Choice(kept, view.states.scatter(1, at[:, :, None].expand_as(mean), mean))


def _most(keep: list[int], view: View) -> int:
    return min(max(keep, default=0), view.valid.shape[1])


def _ranks(values: Tensor) -> Tensor:
    """(I, n) -> (I, n) int: place of each in ascending order, the lower index first."""
    order = values.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(1, order, _places(order).expand_as(order))


def _column(values: list[int], like: Tensor) -> Tensor:
    """One number an image -> (I, 1)."""
    return torch.tensor(values, device=like.device)[:, None]


def _places(like: Tensor) -> Tensor:
    """(1, n): 0, 1, 2, ..."""
    return torch.arange(like.shape[1], device=like.device)[None]


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"the rule of this stage needs {name}, and the view has none: see StageRule.needs.")
    return tensor


# ViTCoP (arXiv 2601.17818)


def vic(features: Tensor, places: Tensor, valid: Tensor, centres: list[int], cutoff: float | None = CUTOFF) -> Tensor:
    """Vision information clustering (ViTCoP, section 3.2 and its code): density peaks with a spatial gate.

    d_ij = ||x_i - x_j||, density rho_i = sum_j exp(-(d_ij / cutoff)^2), parent of i = the nearest j that is denser and not
    farther than 0.6 in space, delta_i = its distance, infinite where there is none. The `centres` highest rho * delta are
    centres, in their order; every other token has the label of its parent.

    Departures: distances come from products of fp32 features that were centred first. Equal densities are ordered by index,
    where the code takes both ways and leaves cycles without a label. A token that has no parent and is no centre
    goes to the centre nearest in features, in the code to the label of token 0. rho contains j = i, as in the code.

    Args:
        features: (I, n, d).
        places: (I, n, 2): row and column as shares of the side.
        valid: (I, n) bool.
        centres: how many, of each image; not more than it has tokens.
        cutoff: None for half the mean distance between the tokens of the image, where features are not those of CLIP ViT-L.

    Returns:
        (I, n) int: labels 0 ... centres - 1; 0 at padding.
    """
    density, delta, parent, distance = peaks(features, places, valid, cutoff)
    most = min(max(centres, default=1), valid.shape[1])
    order = (density * delta).masked_fill(~valid, -1).argsort(dim=-1, descending=True, stable=True)[:, :most]
    ranks = _places(order).expand_as(order)
    wanted = (ranks < _column(centres, order)) & valid.gather(1, order)
    label = torch.full_like(parent, -1).scatter(1, order, torch.where(wanted, ranks, -1))
    to_centres = distance.gather(2, order[:, None].expand(-1, distance.shape[1], -1)).masked_fill(~wanted[:, None], torch.inf)
    parent = torch.where(delta.isinf(), order.gather(1, to_centres.argmin(-1)), parent)
    parent = torch.where(label >= 0, _places(parent), parent)
    for _ in range(math.ceil(math.log2(max(valid.shape[1], 2))) + 1):  # pointer doubling
        parent = parent.gather(1, parent)
    return label.gather(1, parent).masked_fill(~valid, 0)


def peaks(
    features: Tensor, places: Tensor, valid: Tensor, cutoff: float | None = CUTOFF
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `vic`: density, delta, parent, each (I, n), and distances (I, n, n)."""
    real = valid[:, :, None] & valid[:, None]
    features = features.float().masked_fill(~valid[:, :, None], 0)
    features = features - features.sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp(min=1)
    square = features.square().sum(-1)
    squared = (square[:, :, None] + square[:, None] - 2 * features @ features.transpose(1, 2)).clamp(min=0)
    own = torch.eye(squared.shape[1], dtype=torch.bool, device=squared.device)
    squared = squared.masked_fill(~real | own, 0)
    distance = squared.sqrt()
    if cutoff is None:
        tokens = valid.sum(-1)
        scale = (distance.sum((1, 2)) / (tokens * (tokens - 1)).clamp(min=1)).clamp(min=TINY)[:, None, None].square() / 4
    else:
        scale = torch.full_like(squared[:, :1, :1], cutoff**2)
    density = torch.exp(-squared / scale).masked_fill(~real, 0).sum(-1)
    rank = _ranks(-density)
    denser = rank[:, None] < rank[:, :, None]
    near = torch.cdist(places.float(), places.float(), compute_mode="donot_use_mm_for_euclid_dist") <= NEAR
    candidates = distance.masked_fill(~(denser & near & real), torch.inf)
    parent = candidates.argmin(-1)
    return density, candidates.gather(2, parent[:, :, None])[:, :, 0], parent, distance


def _with_clusters(
    view: View, kept: Tensor, features: Tensor, keep: list[int], centre_share: float, cutoff: float | None
) -> Choice:
    """The kept tokens, and their clusters: max(1, int(centre_share * keep)) of them."""
    index = gathered(kept, _most(keep, view))
    rows, columns, known = grid_of(view)
    at = view.positions.gather(1, index)
    side = torch.maximum(rows, columns).float()
    places = torch.stack((at // columns, at % columns), -1) / side[:, :, None] * known[:, :, None]
    centres = [max(1, int(centre_share * count)) for count in keep]
    labels = vic(of_tokens(features, index), places, kept.gather(1, index), centres, cutoff)
    return Choice(kept, labels=torch.zeros_like(view.positions).scatter(1, index, labels))


def cls_clusters(view: View, keep: list[int], centre_share: float = 0.18, cutoff: float | None = CUTOFF) -> Choice:
    """ViTCoP, stage I: the highest attention from [CLS], summed over heads, and `vic` labels from the tower's keys.

    Departures: those of `vic`; places are (row, column) over the longer side, in the code over 24, and images whose grid is not
    known (see `grid_of`) are clustered without the spatial gate.
    """
    kept = ranked(_given(view.class_attention, "class_attention"), view.valid, keep)
    return _with_clusters(view, kept, _given(view.tower_keys, "tower_keys"), keep, centre_share, cutoff)


def diverse_clusters(view: View, keep: list[int], centre_share: float = 0.18) -> Choice:
    """Stage I of ViTCoP for towers without [CLS]; ours, not the paper's: the most different features (`divprune`), and `vic`
    labels from features, the cut-off half their mean distance."""
    return _with_clusters(view, divprune(view, keep).kept, view.states, keep, centre_share, None)


def quotas(sizes: Tensor, costs: Tensor, keep: Tensor) -> Tensor:
    """How many tokens of each cluster stay as they are, so that these and one merged token of each cluster are `keep`.

    quota = round((size - 1) / (n - K) * (R - K)) of n tokens in K clusters, halves to the even number; what is then missing,
    or too much, is spread by one in one walk over the clusters, the lowest cost first when adding, the highest when removing
    (ViTCoP's code). One walk is always enough: at least two clusters were rounded down for each token that is missing.

    Args:
        sizes: (I, C) int, 0 where there is no cluster.
        costs: (I, C).
        keep: (I, 1) int, K <= keep <= n; otherwise the result means nothing.

    Returns:
        (I, C) int, at most size - 1.
    """
    clusters = (sizes > 0).sum(-1, keepdim=True)
    others = (sizes - 1).clamp(min=0)
    whole = others.sum(-1, keepdim=True).clamp(min=1)
    exact = others * (keep - clusters).clamp(min=0)  # times 1 / whole, in integers
    quota, rest = exact // whole, 2 * (exact % whole)
    quota = quota + ((rest > whole) | ((rest == whole) & (quota % 2 == 1)))
    left = keep - clusters - quota.sum(-1, keepdim=True)
    up = costs.argsort(dim=-1, stable=True)
    added = _first((quota < others).gather(1, up), left)
    down = up.flip(-1)
    removed = _first((quota > 0).gather(1, down), -left)
    return quota.scatter_add(1, up, added.long()).scatter_add(1, down, -removed.long())


def _first(possible: Tensor, count: Tensor) -> Tensor:
    """(I, C) bool: the first `count` that are possible."""
    return possible & (possible.cumsum(-1) <= count)


def by_clusters(view: View, cost: Tensor, keep: list[int], doubled: bool) -> Choice:
    """Stage II of ViTCoP, tokens ranked by `cost` (I, n), the lowest first.

    K clusters and R tokens to keep. K <= R: of each cluster the `quotas` tokens of lowest cost stay, all others of it become
    one. K > R: the R - 1 clusters of lowest cost (the sum over their tokens) become a token each, all other clusters one.
    """
    labels, valid, index = _given(view.labels, "labels of an earlier stage"), view.valid, _places(view.valid)
    real = valid[:, :, None] & valid[:, None]
    same = (labels[:, :, None] == labels[:, None]) & real
    head = (same & (index[:, None] < index[:, :, None])).sum(-1).eq(0) & valid  # the first token of each cluster speaks for it
    cost = cost.float().masked_fill(~valid, 0)
    sums = torch.where(same, cost[:, None], 0).sum(-1)
    clusters = head.sum(-1, keepdim=True)
    wanted = torch.minimum(_column(keep, cost), valid.sum(-1, keepdim=True))

    quota = quotas(same.sum(-1) * head, sums.masked_fill(~head, torch.inf), wanted)
    speaker = same.byte().argmax(-1)
    quota = quota.gather(1, speaker)
    rank = _ranks(cost)
    lower = rank[:, None] < rank[:, :, None]
    alone = (same & lower).sum(-1) < quota
    few = same & ~alone[:, :, None] & ~alone[:, None]
    few = few | (torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device) & real)

    cheap = (_ranks(sums.masked_fill(~head, torch.inf)) < wanted - 1).gather(1, speaker)
    many = same | (real & ~cheap[:, :, None] & ~cheap[:, None])
    return merged(view, torch.where((clusters > wanted)[:, :, None], many, few), keep, doubled)


def key_norms(view: View) -> Tensor:
    """(I, n): n_i = || mean over key-value heads of k_i ||_2. RoPE turns every head alike, so it changes no norm."""
    return _given(view.keys, "keys").float().mean(2).square().sum(-1).sqrt()


def cluster_merge(view: View, keep: list[int], compat: bool = False) -> Choice:
    """ViTCoP, stage II: `by_clusters`, a small key norm being important.

    Departures: a merged token is the mean of its group; with compat=True it is the median member plus the mean, as in the code.
    It stands where the lower median member was.
    """
    return by_clusters(view, key_norms(view), keep, compat)


def cluster_attention(view: View, keep: list[int], compat: bool = False) -> Choice:
    """Stage II of ViTCoP for towers without [CLS], where key norms are known to fail; ours, not the paper's: tokens ranked by
    attention from the last instruction token. Clusters that together receive the most come first."""
    return by_clusters(view, -_given(view.last_attention, "last_attention"), keep, compat)


def key_norm(view: View, keep: list[int]) -> Choice:
    """ViTCoP, stage III: the smallest key norms."""
    return Choice(ranked(-key_norms(view), view.valid, keep))


# Attention inside the language model


def _of_texts(view: View) -> Tensor:
    """(I, T, n): text_attention, nothing where either side is padding."""
    real = _given(view.text_valid, "text_valid")[:, :, None] & view.valid[:, None]
    return _given(view.text_attention, "text_attention").float().masked_fill(~real, 0)


def last_attention(view: View, keep: list[int]) -> Choice:
    """FastV (arXiv 2403.06764): the highest attention, in the layer before, from the last token, mean over heads. PyramidDrop
    (arXiv 2410.17247) ranks alike, by the last instruction token.

    Departure: PyramidDrop computes that row anew with the weights of the next layer.
    """
    return Choice(ranked(_given(view.last_attention, "last_attention"), view.valid, keep))


def rater_attention(view: View, keep: list[int]) -> Choice:
    """SparseVLM (arXiv 2410.04417): the highest mean attention from raters, text tokens t whose relevance
    mean_v softmax_t(h_v . h_t) is above the average.

    Departures: raters are chosen at every stage from the states that enter the layer, in the code once from embeddings.
    Tokens that leave are not recycled (as in SparseVLM+). Where no text token is above the average, all are raters.
    """
    attention, text = _of_texts(view), _given(view.text_states, "text_states").float()
    sees = attention.sum(-1) > 0  # text behind the image
    products = (view.states.float() @ text.transpose(1, 2)).masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
    shares = products.softmax(-1).masked_fill(~(view.valid[:, :, None] & sees[:, None]), 0)
    relevance = shares.sum(1) / view.valid.sum(-1, keepdim=True).clamp(min=1)
    raters = sees & (relevance * sees.sum(-1, keepdim=True) > 1 + TINY)  # the average of T shares is 1 / T
    raters = torch.where(raters.any(-1, keepdim=True), raters, sees).float()
    return Choice(ranked((raters[:, None] @ attention)[:, 0], view.valid, keep))


# [CLS] of the vision tower


def visionzip(view: View, keep: list[int]) -> Choice:
    """VisionZip (arXiv 2412.04467): dominant tokens by attention from [CLS]; among the rest, targets at a uniform stride, each
    other token assigned to the target of highest cosine between keys: target + mean(assigned).

    Of `keep`, 10 in 64 are contextual (the published 54 + 10, 108 + 20, 162 + 30).

    Departures: keys of all heads are concatenated, in the code they are their mean over heads. Projected features are merged,
    in the code those before the projector. [CLS] itself is not handed on: a patch more is dominant in its place.
    """
    contextual = [(10 * count + 32) // 64 for count in keep]
    dominant = [count - few for count, few in zip(keep, contextual, strict=True)]
    chosen = ranked(_given(view.class_attention, "class_attention"), view.valid, dominant)
    rest = view.valid & ~chosen
    wanted = _column(contextual, view.valid)
    step = (rest.sum(-1, keepdim=True) // wanted.clamp(min=1)).clamp(min=1)
    place = rest.cumsum(-1) - 1
    target = rest & (place % step == 0) & (place // step < wanted)
    likeness = cosines(_given(view.tower_keys, "tower_keys")).masked_fill(~target[:, None], -torch.inf)
    goes = rest & ~target & target.any(-1, keepdim=True)
    nearest = likeness.argmax(-1)
    assigned = (nearest[:, None] == _places(nearest)[:, :, None]) & goes[:, None]  # (I, target, token)
    kept = chosen | target
    at = gathered(kept, _most(keep, view))
    rows = of_tokens(assigned.float(), at)
    count, own = rows.sum(-1, keepdim=True), of_tokens(view.states, at)
    mean = (rows @ view.states.float().masked_fill(~view.valid[:, :, None], 0)) / count.clamp(min=1)
    states = torch.where(count > 0, own.float() + mean, own.float()).to(own.dtype)
    return Choice(kept, view.states.scatter(1, at[:, :, None].expand_as(states), states))


# Sets grown token by token: the loop is over picks, each step over all images and candidates at once


def divprune(view: View, keep: list[int]) -> Choice:
    """DivPrune (arXiv 2503.02175): greedy max-min of the cosine distance. First the token whose nearest neighbour is farthest,
    then always the one that is farthest from those chosen."""
    distance, least = 1 - cosines(view.states), torch.finfo(torch.float32).min
    apart = distance.masked_fill(~view.valid[:, None], torch.inf)
    own = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    apart = apart.masked_fill(own, torch.inf)
    nearest = apart.amin(-1).clamp(max=-least).masked_fill(~view.valid, -torch.inf)
    # A token is farther than anything from nothing, and nearer than anything to itself: once chosen, never again.
    distance = distance.masked_fill(~view.valid[:, None] | own, -torch.inf)
    picks = []
    for step in range(_most(keep, view)):  # four kernels each
        picks.append(nearest.argmax(-1, keepdim=True))
        row = _row(distance, picks[-1])
        nearest = row if step == 0 else torch.minimum(nearest, row)
    wanted = torch.arange(len(picks), device=nearest.device) < _column(keep, nearest)
    order = torch.where(wanted, torch.cat(picks, 1), view.valid.shape[1])  # of images that want fewer the rest goes nowhere
    return Choice(F.pad(view.valid & False, (0, 1)).scatter(1, order, True)[:, :-1] & view.valid)


def cdpruner(view: View, keep: list[int]) -> Choice:
    """CDPruner (arXiv 2506.10967): greedy MAP of a determinantal point process (arXiv 1709.05135) with the kernel
    diag(r) L diag(r), L = cosines of features, r = relevance to the instruction, min-max normalised.

    Departure: relevance is the cosine with the mean of the text's states, in the paper that of CLIP's two embeddings, which a
    vision-language model does not have.
    """
    relevance = _min_max(text_relevance(view), view.valid) + TINY
    kernel = relevance[:, :, None] * cosines(view.states) * relevance[:, None]
    gain, chosen = kernel.diagonal(dim1=1, dim2=2).clone(), torch.zeros_like(view.valid)
    basis = kernel.new_zeros(kernel.shape[0], _most(keep, view), kernel.shape[-1])  # rows of the Cholesky factor
    wanted = _column(keep, kernel)
    for step in range(basis.shape[1]):
        pick, chosen = _picked(gain, chosen, view.valid, wanted, step)
        known = basis.gather(2, pick[:, :, None].expand(-1, basis.shape[1], 1))  # (I, most, 1)
        row = (_row(kernel, pick) - (known * basis).sum(1)) / gain.gather(1, pick).clamp(min=TINY**2).sqrt()
        basis[:, step] = row
        gain = gain - row.square()
    return Choice(chosen)


def tops(view: View, keep: list[int], relevance: str = "class", coverage: float = 1.0, diversity: float = 1.0) -> Choice:
    """TOPS (arXiv 2606.27161): first the most relevant token, then always argmax of r + coverage * c + diversity * d.

    Of tokens i against those chosen, S: c = sum over j outside S of max(0, sim(i, j) - max_{k in S} sim(j, k)), and
    d = 1 - max_{k in S} sim(i, k); r and c are min-max normalised, c over the tokens that are left. sim is the cosine of
    states. Both weights are 1 unless given.

    Args:
        relevance: "class" (attention from [CLS]), "text" (cosine with the mean of the text's states, where there is no
            [CLS]), "last" or "attention" (from the last instruction token, or from all text, in the layer before).
    """
    worth, chosen = _min_max(_relevance(view, relevance), view.valid), torch.zeros_like(view.valid)
    likeness = cosines(view.states)
    score, covered, wanted = worth, torch.full_like(worth, -1), _column(keep, worth)
    for step in range(_most(keep, view)):
        pick, chosen = _picked(score, chosen, view.valid, wanted, step)
        covered = torch.maximum(covered, _row(likeness, pick))
        open_ = view.valid & ~chosen
        gains = (likeness - covered[:, None]).clamp(min=0).masked_fill(~open_[:, None], 0).sum(-1)
        score = worth + coverage * _min_max(gains, open_) + diversity * (1 - covered)
    return Choice(chosen)


def cover(view: View, keep: list[int]) -> Choice:
    """comp's own: the tokens that cover the image best, each of which then stands for those that it covers.

    Greedily the token i of largest gain sum_j w_j max(0, sim(i, j) - max_{k in S} sim(j, k)), j over all tokens and S those
    chosen: facility location (submodular, so greedy reaches 1 - 1/e of the best). w_j is how many tokens j stands for already,
    sim the cosine of states.
    """
    weight, likeness = _weights(view), cosines(_states(view))
    chosen, wanted = torch.zeros_like(view.valid), _column(keep, weight)
    covered = torch.full_like(weight, -1)
    for step in range(_most(keep, view)):
        gains = ((likeness - covered[:, None]).clamp(min=0) * weight[:, None]).sum(-1)
        gains = (gains / gains.amax(-1, keepdim=True).clamp(min=TINY**2) * TIES).round()
        pick, chosen = _picked(gains, chosen, view.valid, wanted, step)
        covered = torch.maximum(covered, _row(likeness, pick))
    return standing_for(view, chosen, likeness, keep)


def standing_for(view: View, chosen: Tensor, likeness: Tensor, keep: list[int]) -> Choice:
    """The chosen tokens (I, n), each of which stands for those that are most like it: states become means, weighted, and
    weights their sum. likeness (I, n, n).

    In attention a token of weight w gets log w added to its logits, as if it were there w times (proportional attention, ToMe,
    arXiv 2210.09461, Eq. 1): without that, what is counted by shares of attention is lost.
    """
    weight = _weights(view)
    goes = likeness.masked_fill(~chosen[:, None], -torch.inf).argmax(-1)
    goes = torch.where(chosen, _places(goes), goes)
    at = gathered(chosen, _most(keep, view))
    shares = ((goes[:, None] == at[:, :, None]) & view.valid[:, None]) * weight[:, None]  # (I, chosen, n)
    total = shares.sum(-1).clamp(min=1)
    weights = torch.ones_like(weight).scatter(1, at, total)
    mean = shares @ _states(view) / total[:, :, None]
    return Choice(chosen, view.states.scatter(1, at[:, :, None].expand_as(mean), mean.to(view.states.dtype)), weights=weights)


def _weights(view: View) -> Tensor:
    """(I, n) fp32: how many tokens each stands for, padding for none."""
    ones = torch.ones(view.valid.shape, device=view.valid.device)
    return (ones if view.weights is None else view.weights.float()).masked_fill(~view.valid, 0)


def _states(view: View) -> Tensor:
    """(I, n, D) fp32, zeros at padding."""
    return view.states.float().masked_fill(~view.valid[:, :, None], 0)


def _relevance(view: View, kind: str) -> Tensor:
    if kind == "class":
        return _given(view.class_attention, "class_attention").float()
    if kind == "last":
        return _given(view.last_attention, "last_attention").float()
    if kind == "attention":
        return _of_texts(view).sum(1)
    if kind == "text":
        return text_relevance(view)
    raise ValueError(f'tops knows the relevance "class", "text", "last" and "attention", not {kind!r}.')


def _picked(score: Tensor, chosen: Tensor, valid: Tensor, wanted: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(I, 1) the best token that is free, and (I, n) those chosen with it, in images that want one more: wanted (I, 1)."""
    free = valid & ~chosen
    pick = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~free, -torch.inf).argmax(-1, keepdim=True)
    more = (_places(valid) == pick) & free & (wanted > step)
    return pick, chosen | more


def _row(matrix: Tensor, index: Tensor) -> Tensor:
    """(I, n, n) and (I, 1) -> (I, n)."""
    return matrix.gather(1, index[:, :, None].expand(-1, 1, matrix.shape[-1]))[:, 0]


def _min_max(values: Tensor, valid: Tensor) -> Tensor:
    """To 0 ... 1 over the valid tokens of each row; 0 where all are equal."""
    low = values.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    span = values.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - low
    return torch.where(valid & (span > 0), (values - low) / span.clamp(min=torch.finfo(torch.float32).tiny), 0)


# Keys


def dart(view: View, keep: list[int], pivots: int = 8) -> Choice:
    """DART (arXiv 2502.11494): pivots, the tokens whose keys have the largest L1 norm, and for each pivot in turn an equal
    share of the budget, the tokens of lowest cosine with it: those that duplicate a pivot go.

    Departures: all pivots are image tokens, in the code half are text tokens. Cosines are of the states that enter the layer,
    in the code behind its norm.
    """
    strength = _given(view.keys, "keys").float().abs().sum((2, 3))
    chosen = ranked(strength, view.valid, [min(pivots, count) for count in keep])
    order = strength.masked_fill(~chosen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    likeness = cosines(view.states)
    for pivot in range(min(pivots, order.shape[1])):
        share = [(max(0, count - pivots) + pivots - 1 - pivot) // pivots for count in keep]
        chosen = chosen | ranked(-_row(likeness, order[:, pivot : pivot + 1]), view.valid & ~chosen, share)
    return Choice(chosen)


# Baselines that do not look at the image


def random(view: View, keep: list[int], seed: int = 0) -> Choice:
    """Tokens at random: the highest of an integer hash of their positions (Wellons' lowbias32), the same in every image."""
    mask = 0xFFFFFFFF
    mixed = (view.positions.long() + 0x9E3779B9 * (seed + 1)) & mask
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & mask
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & mask
    return Choice(ranked((mixed ^ (mixed >> 16)) >> 8, view.valid, keep))  # 24 bits: exact in fp32


def stride(view: View, keep: list[int]) -> Choice:
    """Tokens evenly spread over the raster: the middle one of each of `keep` runs of equal length."""
    tokens, place = view.valid.sum(-1, keepdim=True), view.valid.cumsum(-1) - 1
    count = torch.minimum(_column(keep, tokens), tokens).clamp(min=1)
    run = place * count // tokens.clamp(min=1)
    begin, end = (-(-number * tokens // count) for number in (run, run + 1))
    return Choice((place == (begin + end - 1) // 2) & view.valid)


def pool(view: View, keep: list[int]) -> Choice:
    """Average pooling of neighbours into `keep` tokens: on a square grid, about sqrt(keep) bands of rows, each cut in blocks
    across; elsewhere runs of the raster. A group stands where its median member was."""
    tokens = view.valid.sum(-1, keepdim=True)
    count = torch.minimum(_column(keep, tokens), tokens).clamp(min=1)
    rows, columns, known = grid_of(view)
    square = known & (rows == columns)
    rows = torch.where(square, rows, 1)
    columns = torch.where(square, columns, tokens.clamp(min=1))
    place = torch.where(square, view.positions, view.valid.cumsum(-1) - 1)
    row, column = place // columns, place % columns
    bands = torch.minimum(count.float().sqrt().round().long(), rows)
    band = row * bands // rows
    begin, end = (-(-number * rows // bands) for number in (band, band + 1))  # rows of the band
    first, last = (number * count // bands for number in (band, band + 1))  # groups of the band
    across = column * (end - begin) + row - begin
    group = first + across * (last - first) // ((end - begin) * columns)
    return merged(view, (group[:, :, None] == group[:, None]) & view.valid[:, :, None] & view.valid[:, None], keep)


STAGE_RULES: dict[str, StageRule] = {
    "cls-clusters": StageRule(cls_clusters, frozenset({"class"})),
    "diverse-clusters": StageRule(diverse_clusters),
    "cluster-merge": StageRule(cluster_merge, frozenset({"keys"})),
    "cluster-attention": StageRule(cluster_attention, frozenset({"last"})),
    "key-norm": StageRule(key_norm, frozenset({"keys"})),
    "last-attention": StageRule(last_attention, frozenset({"last"})),
    "rater-attention": StageRule(rater_attention, frozenset({"text", "attention"})),
    "visionzip": StageRule(visionzip, frozenset({"class"})),
    "divprune": StageRule(divprune),
    "dart": StageRule(dart, frozenset({"keys"})),
    "cdpruner": StageRule(cdpruner, frozenset({"text"})),
    "tops": StageRule(tops),  # and its relevance
    "cover": StageRule(cover, weighs=True),
    "random": StageRule(random),
    "stride": StageRule(stride),
    "pool": StageRule(pool),
}
OF_THE_LAYER_BEFORE = frozenset({"keys", "attention", "last"})  # what no stage before layer 0 has


def needs_of(rule: str, settings: dict[str, Any]) -> frozenset[str]:
    """What has to be computed for a stage, see StageRule."""
    return STAGE_RULES[rule].needs | ({settings.get("relevance", "class")} if rule == "tops" else frozenset())


def may_be_first(rule: str, settings: dict[str, Any]) -> bool:
    """Whether a stage may stand before layer 0."""
    return not needs_of(rule, settings) & OF_THE_LAYER_BEFORE
