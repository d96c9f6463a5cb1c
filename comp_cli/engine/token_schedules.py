"""Where image tokens leave a decoder, and how many stay: from a method and a number of tokens to stages. Light: no torch.

A number of tokens means, for the methods that drop in several stages (STAGED), the mean over the decoder's layers, which is
what papers compare; for all others the tokens that stay at their only stage.
"""

import math
from collections.abc import Iterator

from ..errors import UsageError
from ..plan import TokenStage

TOKEN_METHODS = {
    "cover": "image tokens that cover the others best and stand for them, before the LLM (comp's own)",
    "vitcop": "image tokens by [CLS] attention, then clusters, then key norms, three stages (ViTCoP, arXiv 2601.17818)",
    "pyramiddrop": "image tokens by attention of the last instruction token, three stages (PyramidDrop, arXiv 2410.17247)",
    "sparsevlm": "image tokens by attention of text tokens that speak of the image, three stages (SparseVLM, arXiv 2410.04417)",
    "fastv": "image tokens by attention of the last token, once, before layer 2 (FastV, arXiv 2403.06764)",
    "dart": "image tokens unlike those with large keys, once, before layer 2 (DART, arXiv 2502.11494)",
    "visionzip": "image tokens by [CLS] attention, the rest merged, before the LLM (VisionZip, arXiv 2412.04467)",
    "tops": "image tokens by relevance, coverage and diversity, before the LLM (TOPS)",
    "divprune": "image tokens with the most different features, before the LLM (DivPrune, arXiv 2503.02175)",
    "cdpruner": "diverse image tokens that fit the text, before the LLM (CDPruner, arXiv 2506.10967)",
    "random-token": "random image tokens, before the LLM",
    "stride": "evenly spread image tokens, before the LLM",
    "pool": "averages of neighbouring image tokens, before the LLM",
}
STAGED = ("vitcop", "pyramiddrop", "sparsevlm")
RULES = {  # of methods with one rule
    "pyramiddrop": "last-attention",
    "sparsevlm": "rater-attention",
    "fastv": "last-attention",
    "random-token": "random",
}
# Rules that read the layer before their stage: not at layer 0.
INSIDE = frozenset({"cluster-merge", "cluster-attention", "key-norm", "last-attention", "rater-attention", "dart"})
BEFORE = frozenset({"cls-clusters", "diverse-clusters", "visionzip"})  # at layer 0 only
SALIENCIES = ("key-norm", "attention")
ONE_SHOT_LAYER = {"fastv": 2, "dart": 2}  # 0 for the others
DEEP = 0.2  # of the tokens of ViTCoP's stage II, what stage III keeps
DEPTH = 32  # layers of the model that schedules were published for
SPARSEVLM = {  # mean tokens of 576 in 32 layers -> kept before layers 2, 6, 15
    192: (300, 200, 110),
    128: (303, 110, 36),
    96: (238, 48, 26),
    64: (66, 30, 17),
}
Amounts = tuple[tuple[int, float], ...]  # (layer, tokens that stay, or their share)


def stages(
    method: str,
    *,
    tokens: int | None,
    share: float | None,
    image_tokens: int,
    layers: int,
    class_token: bool,
    clip: bool = True,
    compat: bool = False,
    saliency: str | None = None,
    fixed_size: bool,
) -> tuple[TokenStage, ...]:
    """The stages of a method.

    Args:
        method: of TOKEN_METHODS.
        tokens: image tokens, see above; or None, and share.
        share: the same as a share of the image's own tokens.
        image_tokens: of an image, of the reference image where images are of several sizes.
        layers: of the decoder.
        class_token: whether the vision tower has [CLS].
        clip: whether that tower is CLIP's, whose keys ViTCoP's density cut-off was published for.
        compat: ViTCoP's merge as in the authors' code.
        saliency: ViTCoP's inside the decoder, of SALIENCIES; None for what suits the tower.
        fixed_size: whether all images have image_tokens; where not, a share stays one.

    Raises:
        UsageError: where that cannot be, with what would work.
    """
    _check(method, class_token, compat, saliency)
    if (tokens is None) == (share is None):
        raise UsageError("how many image tokens stay was given twice or not at all.", hint="Use --tokens or --tokens-share.")
    total = 1.0 if share is not None and not fixed_size else image_tokens
    mean = share * total if share is not None else tokens or 0
    amounts = _amounts(method, mean, total, layers)
    if not _drops(amounts, total, layers):
        raise _impossible(method, mean, total, layers)
    found = _with_rules(method, amounts, total, class_token, clip, compat, saliency)
    counts = [image_tokens, *(stage.left(image_tokens) for stage in found)]
    if any(after >= before for before, after in zip(counts, counts[1:], strict=False)):  # by rounding up
        said = (
            f"{method}: of the {image_tokens} tokens of the reference image {', then '.join(map(str, counts[1:]))} would stay"
        )
        raise UsageError(f"{said}: nothing goes at one of the stages.", hint="Use another share, or --token-stages.")
    return found


def parse_stages(
    text: str,
    method: str,
    *,
    image_tokens: int,
    layers: int,
    class_token: bool,
    clip: bool = True,
    compat: bool = False,
    saliency: str | None = None,
) -> tuple[TokenStage, ...]:
    """The stages of a method, given one by one: "0:172,2:77,22:15" keeps 172 image tokens before layer 0, 77 before layer 2,
    and so on; numbers with a point are shares of the image's tokens ("0:0.3,2:0.13"). See `stages` for the rest."""
    _check(method, class_token, compat, saliency)
    shares = "." in text
    try:
        pairs = [part.split(":") for part in text.split(",")]
        amounts = tuple((int(layer), float(amount) if shares else int(amount)) for layer, amount in pairs)
    except ValueError:
        raise UsageError(
            f"stages {text!r}: expected LAYER:TOKENS, several with commas.",
            hint="For example 0:172,2:77,22:15, or 0:0.3,2:0.13.",
        ) from None
    total = 1.0 if shares else image_tokens
    if method == "vitcop" and len(amounts) != 3:
        raise UsageError(
            f"stages {text!r}: vitcop has three stages, {len(amounts)} are given.", hint="For example 0:172,2:77,22:15."
        )
    if not _drops(amounts, total, layers):
        raise UsageError(
            f"stages {text!r}: layers must rise, up to {layers - 1}, and at each stage fewer tokens must stay than before, "
            f"from {'shares below 1' if shares else f'less than the image has ({image_tokens})'} to more than 0.",
            hint="Name fewer tokens, or other layers.",
        )
    return _with_rules(method, amounts, total, class_token, clip, compat, saliency)


def mean_tokens(found: tuple[TokenStage, ...], image_tokens: int, layers: int) -> float:
    """Image tokens of one image that a layer of the decoder sees, the mean over its layers."""
    counts = (
        next((stage.left(image_tokens) for stage in reversed(found) if stage.layer <= layer), image_tokens)
        for layer in range(layers)
    )
    return sum(counts) / layers


def saliency_note(method: str, class_token: bool, saliency: str | None) -> str | None:
    """What a user must know of a ranking that is not the method's own on such a tower; None where it is."""
    if method != "vitcop" or class_token:
        return None
    if saliency == "key-norm":
        return (
            "this model's vision tower has no [CLS], and key norms are known to fail there (on Qwen2.5-VL 63 to 74 % of the "
            "accuracy is left, less on documents): measure with --data, or leave --saliency out."
        )
    return (
        "this model's vision tower has no [CLS], which vitcop asks: tokens are chosen by diversity of features before the LLM, "
        "and by attention from the last instruction token inside it. This is comp's, not the paper's: measure with --data."
    )


def _check(method: str, class_token: bool, compat: bool, saliency: str | None) -> None:
    if method not in TOKEN_METHODS:
        raise UsageError(
            f"{method} is no method for image tokens of a decoder.", hint=f"Use one of {', '.join(TOKEN_METHODS)}."
        )
    if method == "visionzip" and not class_token:
        raise UsageError(
            "visionzip ranks image tokens by attention from [CLS], and this model's vision tower has none.",
            hint="Use tops or divprune, which do not ask it.",
        )
    if method != "vitcop" and (compat or saliency):
        raise UsageError(
            f"--{'compat' if compat else 'saliency'} is for vitcop; {method} knows no such choice.", hint="Leave it out."
        )
    if saliency not in (None, *SALIENCIES):
        raise UsageError(f"{saliency} is no saliency of vitcop.", hint=f"Use one of {', '.join(SALIENCIES)}.")


def _amounts(method: str, mean: float, total: float, layers: int) -> Amounts:
    """What stays where, of `total` tokens (1.0: in shares), whether that can be or not."""
    if method == "vitcop":
        return _vitcop(mean, total, layers)
    if method == "pyramiddrop":
        at = _scaled((2, 8, 16), layers)
        return _with_mean(at, (4, 2, 1), mean, total, layers)
    if method == "sparsevlm":
        return _sparsevlm(mean, total, layers)
    return ((min(ONE_SHOT_LAYER.get(method, 0), layers - 1), _whole(mean, total)),)


def _vitcop(mean: float, total: float, layers: int) -> Amounts:
    """ViTCoP (arXiv 2601.17818): V tokens before layer 0, S before layer s, D = S / 5 before layer d, so that the mean over L
    layers is as wanted: S = (L * mean - s * V) / ((d - s) + (L - d) / 5). s = 2 and d = 22 of 32 layers, scaled to others.

    V is the share 0.2 + 0.9 * mean / total, on which the published 0.5, 0.4, 0.3 for 1/3, 2/9, 1/9 lie exactly; more where S
    would not be less than V.
    """
    shallow, deep = _scaled((2, 22), layers)
    weight = deep + DEEP * (layers - deep)  # S = V = layers * mean / weight
    least = layers * mean / weight
    first = round(0.2 + 0.9 * mean / total, 6) * total
    first = max(int(first), math.floor(least) + 1) if total > 1 else max(first, least * 1.001)

    def behind(before: float) -> float:
        return _whole((layers * mean - shallow * before) / (weight - shallow), total)

    while total > 1 and behind(first) >= first and first < total:  # by rounding
        first += 1
    second = behind(first)
    third = max(round(DEEP * second), 1) if total > 1 else DEEP * second
    return (0, _digits(first)), (shallow, _digits(second)), (deep, _digits(third))


def _sparsevlm(mean: float, total: float, layers: int) -> Amounts:
    """SparseVLM (arXiv 2410.04417): the lists of its code for 576 tokens in 32 layers; elsewhere the list of the nearest share,
    all of it times what makes the mean as wanted."""
    at = _scaled((2, 6, 15), layers)
    if total == 576 and layers == DEPTH and mean in SPARSEVLM:
        return tuple(zip(at, SPARSEVLM[int(mean)], strict=True))
    nearest = min(SPARSEVLM, key=lambda published: abs(published / 576 - mean / total))
    return _with_mean(at, SPARSEVLM[nearest], mean, total, layers)


def _with_mean(at: tuple[int, ...], shape: tuple[int, ...], mean: float, total: float, layers: int) -> Amounts:
    """Amounts in proportion to `shape`, all tokens before the first stage, so that the mean over layers is as wanted."""
    lengths = [end - begin for begin, end in zip(at, (*at[1:], layers), strict=True)]
    unit = (layers * mean - at[0] * total) / max(sum(length * part for length, part in zip(lengths, shape, strict=True)), 1)
    return tuple((layer, _whole(unit * part, total)) for layer, part in zip(at, shape, strict=True))


def _scaled(published: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Layers of a model with 32 of them -> of one with another depth: at least 1, and each behind the one before."""
    found: list[int] = []
    for layer in published:
        found.append(max(round(layer * layers / DEPTH), found[-1] + 1 if found else 1))
    return tuple(found)


def _whole(amount: float, total: float) -> float:
    return round(amount) if total > 1 else _digits(amount)


def _digits(amount: float) -> float:
    return amount if isinstance(amount, int) else round(amount, 6)


def _drops(amounts: Amounts, total: float, layers: int) -> bool:
    """Whether tokens leave at every stage, some stay, and the layers are in order and there."""
    places, counts = [layer for layer, _ in amounts], [total, *(count for _, count in amounts)]
    falls = all(after < before for before, after in zip(counts, counts[1:], strict=False))
    rises = all(before < after for before, after in zip([-1, *places], places, strict=False))
    return falls and rises and counts[-1] > 0 and places[-1] < layers


def _impossible(method: str, mean: float, total: float, layers: int) -> UsageError:
    """What would work, where something does."""
    whole = total > 1
    candidates: Iterator[float] = iter(range(1, int(total))) if whole else (step / 1000 for step in range(1, 1000))
    works = [count for count in candidates if _drops(_amounts(method, count, total, layers), total, layers)]
    kind = "a mean of " if method in STAGED else ""
    said = f"{mean:g} of {total} tokens" if whole else f"a share of {mean:g}"
    if not works:
        return UsageError(
            f"{method} cannot be on {total:g} image tokens and {layers} layers.", hint="Use tops or divprune, which drop once."
        )
    return UsageError(
        f"{method} cannot keep {kind}{said} in {layers} layers: fewer must stay at every stage, and more than 0.",
        hint=f"Use --tokens{'' if whole else '-share'} from {works[0]} to {works[-1]}, or --token-stages.",
    )


def _with_rules(
    method: str, amounts: Amounts, total: float, class_token: bool, clip: bool, compat: bool, saliency: str | None
) -> tuple[TokenStage, ...]:
    """The stages of amounts, each with its rule. Raises UsageError where a rule cannot stand there."""
    layers = [layer for layer, _ in amounts]
    rules = [_rule_at(method, layer, class_token) for layer in layers]
    if method == "vitcop":
        by_keys = saliency == "key-norm" or (saliency is None and class_token)
        # 0.18, 0.15, 0.12 of the kept tokens are centres where 0.5, 0.4, 0.3 of all were kept: on a line.
        centres: dict[str, object] = {"centre_share": round(0.03 + 0.3 * amounts[0][1] / total, 2)}
        if class_token and not clip:
            centres["cutoff"] = None  # half of the mean distance of each image's keys
        rules = [
            ("cls-clusters" if class_token else "diverse-clusters", centres),
            ("cluster-merge" if by_keys else "cluster-attention", {"compat": compat}),
            ("key-norm" if by_keys else "last-attention", {}),
        ]
    first = rules[0][0]
    if layers[0] == 0 and first in INSIDE:
        raise UsageError(
            f"{method}: {first} reads the layer before its stage, and layer 0 has none.",
            hint="Begin with layer 1 or a later one, or use tops or divprune.",
        )
    if layers[0] > 0 and first in BEFORE:
        raise UsageError(f"{method}: its first stage reads the vision tower, before layer 0.", hint="Begin with layer 0.")
    whole = total > 1
    return tuple(
        TokenStage(layer, rule, int(amount) if whole else None, None if whole else amount, settings)
        for (layer, amount), (rule, settings) in zip(amounts, rules, strict=True)
    )


def _rule_at(method: str, layer: int, class_token: bool) -> tuple[str, dict[str, object]]:
    """(rule, settings) of a method that has one rule."""
    if method != "tops":
        return RULES.get(method, method), {}
    return method, {"relevance": "last" if layer else "class" if class_token else "text"}
