"""What follows from cross-mode interference for a model: CoMP's two findings as sentences, with the limits that they go by.

Importance of parameters is measured on tokens, and importance of tokens by heads. Where the tokens that speak for a head are
not those that stay, or the heads that rank tokens are not those that stay, one kind of pruning misleads the other.
"""

from collections.abc import Sequence
from statistics import fmean

from .analyze import Conclusion, LayerDiagnosis
from .numbers import percent, short_percent

INTERFERES, UNCLEAR, SEPARATE = "interferes", "unclear", "separate"
# How far overlap is from chance (0) to all (1): below the first the tokens are others, from the second on mostly the same.
OVERLAP_LIMITS = (0.25, 0.6)
# Share of a layer's least heads that influence the ranking strongly: up to the first few do, from the second on many.
HEADS_LIMITS = (0.2, 0.5)
ADVICE = {
    (
        "tokens",
        INTERFERES,
    ): "Importance that is measured on all tokens speaks for tokens that will be gone: remove heads, channels "
    "and tokens together (the methods comp and comp-paper), and not parameters first (sjp-reversed).",
    (
        "tokens",
        UNCLEAR,
    ): "That is between the limits: removing parameters and tokens together is the safe choice, and a run of each "
    "order (comp, sjp, sjp-reversed) would tell what it is worth.",
    (
        "tokens",
        SEPARATE,
    ): "Importance of parameters speaks for the tokens that stay: by this finding parameters and tokens may be "
    "removed one after the other.",
    (
        "heads",
        INTERFERES,
    ): "Heads that look superfluous decide which tokens stay: tokens have to be ranked by the heads that stay "
    "(comp, comp-paper), and not before heads go (sjp).",
    ("heads", UNCLEAR): "That is between the limits: ranking tokens by the heads that stay is the safe choice.",
    (
        "heads",
        SEPARATE,
    ): "The ranking of tokens hardly asks the heads that would go: by this finding tokens may be ranked before "
    "or after heads go.",
}


def conclusions(layers: Sequence[LayerDiagnosis], least: float) -> tuple[Conclusion, ...]:
    """Both findings for each tower. least: share of a layer's heads that count as least important."""
    found = []
    for tower in dict.fromkeys(layer.tower for layer in layers):
        own = [layer for layer in layers if layer.tower == tower]
        found.append(of_tokens(tower, own))
        if any(layer.influence is not None for layer in own):
            found.append(of_heads(tower, own, least))
    return tuple(found)


def of_tokens(tower: str, layers: Sequence[LayerDiagnosis]) -> Conclusion:
    """Whether the tokens behind the importance of parameters are the top tokens, mean over layers and their parts."""
    pairs = [(share, layer.chance) for layer in layers for share in layer.overlap.values()]
    overlap, chance = (fmean(values) for values in zip(*pairs, strict=True))
    distance = fmean((share - by_chance) / (1 - by_chance) if by_chance < 1 else 1.0 for share, by_chance in pairs)
    low, high = OVERLAP_LIMITS
    verdict = INTERFERES if distance < low else SEPARATE if distance >= high else UNCLEAR
    said = (
        f"of the tokens that drive the importance of heads and channels, {percent(overlap)} are among the top tokens, where "
        f"{percent(chance)} would be by chance, mean over layers. {ADVICE['tokens', verdict]}"
    )
    return Conclusion(tower, "tokens", verdict, overlap, distance, low, high, f"{tower}: {said}")


def of_heads(tower: str, layers: Sequence[LayerDiagnosis], least: float) -> Conclusion:
    """Whether heads of little importance decide which tokens rank high, mean over layers."""
    influences = [layer.influence for layer in layers if layer.influence is not None]
    strong, changed = fmean(one.strong for one in influences), fmean(one.changed_by_least for one in influences)
    low, high = HEADS_LIMITS
    verdict = INTERFERES if strong >= high else SEPARATE if strong <= low else UNCLEAR
    said = (
        f"of the {short_percent(least)} least important heads of a layer, {percent(strong)} change strongly which tokens "
        f"would be kept; without one of them {percent(changed)} of the kept tokens are others, mean over layers. "
        f"{ADVICE['heads', verdict]}"
    )
    return Conclusion(tower, "heads", verdict, strong, strong, low, high, f"{tower}: {said}")
