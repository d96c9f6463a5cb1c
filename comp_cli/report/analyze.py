"""The report of `comp analyze`."""

from dataclasses import dataclass

from .base import PairCounts, Reference, Report, Texts, Threads, if_known


@dataclass(frozen=True)
class Cost:
    """Parameters or FLOPs of a model.

    Attributes:
        total: of the whole model.
        outside_layers: of embeddings, heads and whatever else is no layer.
    """

    total: int
    outside_layers: int


@dataclass(frozen=True)
class LayerCost:
    """FLOPs and parameters of the prunable parts of a layer.

    Attributes:
        tower: name of the tower.
        layer: index of the layer in it.
        flops: by part: attention, cross (cross-attention), ffn (feed-forward).
        params: parameters, by part.
    """

    tower: str
    layer: int
    flops: dict[str, int]
    params: dict[str, int]


@dataclass(frozen=True)
class LayerInequality:
    """Gini coefficients of importance in a layer: 0 where all units matter alike, towards 1 where few do. Null for parts that
    the layer lacks.

    Attributes:
        tower: name of the tower.
        layer: index of the layer in it.
        tokens: of tokens, mean over samples.
        attention: of attention heads.
        cross: of heads of the cross-attention.
        ffn: of feed-forward channels.
    """

    tower: str
    layer: int
    tokens: float | None
    attention: float | None
    cross: float | None
    ffn: float | None


@dataclass(frozen=True)
class LayerInfluence:
    """What the heads of a layer do to its token ranking.

    Attributes:
        least_heads: the heads of least plain importance (CoMP, Eq. 3).
        changed_by_least: share of the kept tokens that changes without one of these heads, mean.
        changed_by_all: share of the kept tokens that changes without any one head, mean.
        correlation_without_least: rank correlation of the token scores with and without these heads, mean.
        strong: share of these heads that influence strongly.
    """

    least_heads: list[int]
    changed_by_least: float
    changed_by_all: float
    correlation_without_least: float
    strong: float


@dataclass(frozen=True)
class LayerDiagnosis:
    """Cross-mode interference in a layer.

    Attributes:
        tower: name of the tower.
        layer: index of the layer in it.
        overlap: share of the tokens behind a part's plain importance that are top tokens as well, by part.
        chance: the same for tokens that are drawn at random.
        influence: what heads do to the token ranking; null in a layer of one head.
    """

    tower: str
    layer: int
    overlap: dict[str, float]
    chance: float
    influence: LayerInfluence | None


@dataclass(frozen=True)
class Diagnostics:
    """CoMP's two findings per layer (arXiv 2604.02956, section 1), with the shares that define them.

    Attributes:
        top_tokens: share of a sample's tokens that count as top tokens.
        least_heads: share of a layer's heads that count as least important.
        kept_tokens: share of a sample's tokens that would be kept.
        strong: a head influences strongly if this share of the kept tokens changes without it.
        layers: the findings.
    """

    top_tokens: float
    least_heads: float
    kept_tokens: float
    strong: float
    layers: tuple[LayerDiagnosis, ...]


@dataclass(frozen=True)
class PartCost:
    """FLOPs and parameters of a part of a decoder that reads images.

    Attributes:
        part: "vision tower", "projector" (whatever makes image tokens of features), "decoder layers", "logits", or "embeddings"
            (what is left of the language model; a matrix that embeds and makes logits as well has its parameters here).
        flops: of the prompt.
        step_flops: of a token behind it.
        params: parameters.
    """

    part: str
    flops: int
    step_flops: int
    params: int


@dataclass(frozen=True)
class Saving:
    """What a decoder would cost if image tokens left.

    Attributes:
        method: whose schedule it is, as `comp prune --method` takes it.
        tokens: image tokens that a layer sees, mean over layers.
        stages: layers and the tokens that stay before them, as `--token-stages` takes them.
        flops: FLOPs of the prompt.
        flops_reduction: by which factor they fall.
        step_flops: FLOPs of a token behind the prompt.
        kv_cache_bytes: keys and values behind the prompt, bytes.
    """

    method: str
    tokens: float
    stages: str
    flops: int
    flops_reduction: float
    step_flops: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class DecoderCost:
    """Where the costs of a decoder that reads images are, at the reference input.

    Attributes:
        image_tokens: of the reference image.
        layers: of the decoder.
        class_token: whether the vision tower has a [CLS] that ranks image tokens.
        parts: FLOPs and parameters by part.
        kv_cache_bytes: keys and values behind the prompt, bytes, in the precision of the checkpoint.
        savings: what it would save if a third, two ninths, a ninth of the image tokens stayed, mean over layers.
    """

    image_tokens: int
    layers: int
    class_token: bool
    parts: tuple[PartCost, ...]
    kv_cache_bytes: int
    savings: tuple[Saving, ...]


@dataclass(frozen=True, kw_only=True)
class AnalyzeReport(Report):
    """Where FLOPs and parameters are, how unequal units are, and how their scores interfere.

    Attributes:
        comp_version: version of comp.
        model: Hub id, name of the folder, "demo" or "demo-vlm".
        revision: commit of a model from the Hub.
        architecture: transformers class.
        task: evaluation task.
        reference: the input that FLOPs are counted for.
        params: parameters.
        flops: FLOPs of one sample at the reference input.
        layers: FLOPs and parameters of every layer; none of a decoder that reads images, see decoder.
        inequality: Gini coefficients of every layer; none of such a decoder.
        diagnostics: cross-mode interference; null for such a decoder.
        score_rows: query rows that score the tokens of each tower; 0 for all.
        samples: pairs that were used.
        data: where they come from.
        pairs: what became of the rows of the user's data, by purpose.
        texts: texts that were truncated.
        decoder: costs of a decoder that reads images.
        threads: CPU threads that it worked with.
    """

    comp_version: str
    model: str
    revision: str | None
    architecture: str
    task: str
    reference: Reference
    params: Cost
    flops: Cost
    layers: tuple[LayerCost, ...]
    inequality: tuple[LayerInequality, ...]
    diagnostics: Diagnostics | None
    score_rows: dict[str, int]
    samples: int
    data: str
    pairs: dict[str, PairCounts]
    texts: Texts
    decoder: DecoderCost | None = if_known()
    threads: Threads | None = if_known()
