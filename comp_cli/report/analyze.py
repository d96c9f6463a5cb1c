"""The report of `comp analyze`."""

from dataclasses import dataclass

from .base import PairCounts, Reference, Report, Sizes, Texts, Threads, if_known, unwritten
from .prune import TokensLeft
from .samples import LayerImportance, Picture, SampleKept, TokenImportance


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
        flops: by part: attention, cross (cross-attention), ffn (feed-forward). What is never pruned counts with the last one.
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
class Conclusion:
    """What one finding says of a tower.

    Attributes:
        tower: name of the tower.
        finding: "tokens" (are the tokens that drive the importance of parameters the top tokens?) or "heads" (do heads of
            little importance decide which tokens stay?).
        verdict: "interferes" (remove parameters and tokens together), "separate" (one after the other is fine by this
            finding), or "unclear".
        share: of "tokens" the overlap, of "heads" the share of the least important heads that influence strongly; means over
            layers.
        judged: what is compared with the limits: of "tokens" how far the overlap is from chance (0) to all (1), of "heads" the
            share.
        low: limit at the lower end: below it tokens are others, up to it few heads influence strongly.
        high: limit at the upper end: from it on tokens are mostly the same, or many heads influence strongly.
        sentence: the same in words.
    """

    tower: str
    finding: str
    verdict: str
    share: float
    judged: float
    low: float
    high: float
    sentence: str


@dataclass(frozen=True)
class Diagnostics:
    """CoMP's two findings per layer (arXiv 2604.02956, section 1), with the shares that define them.

    Attributes:
        top_tokens: share of a sample's tokens that count as top tokens.
        least_heads: share of a layer's heads that count as least important.
        kept_tokens: share of a sample's tokens that would be kept.
        strong: a head influences strongly if this share of the kept tokens changes without it.
        layers: the findings.
        conclusions: what follows for the model.
    """

    top_tokens: float
    least_heads: float
    kept_tokens: float
    strong: float
    layers: tuple[LayerDiagnosis, ...]
    conclusions: tuple[Conclusion, ...]


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


@dataclass(frozen=True)
class LayerCompared:
    """A layer of a compact model beside the same layer of the dense one. Units and tokens are [compact, dense].

    Attributes:
        tower: name of the tower.
        layer: index of the layer in it.
        heads: attention heads; null where there is none.
        cross_heads: heads of the cross-attention; null where there is none.
        ffn: feed-forward channels; null where there are none.
        tokens: tokens that the layer hands on, those of all its streams; in a decoder that image tokens leave, those that the
            layer sees.
        flops: FLOPs of the layer at the reference input.
        params: parameters of the layer.
    """

    tower: str
    layer: int
    heads: list[int] | None
    cross_heads: list[int] | None
    ffn: list[int] | None
    tokens: list[int]
    flops: Sizes
    params: Sizes


@dataclass(frozen=True)
class PartCompared:
    """FLOPs and parameters of a part, of the dense and of the compact model.

    Attributes:
        tower: name of the tower; "outside" for what is no layer: embeddings, heads, projections.
        part: "attention", "cross" (cross-attention), "ffn" (feed-forward), or "" outside of the layers.
        flops: of a sample at the reference input.
        params: parameters; shared ones count once.
    """

    tower: str
    part: str
    flops: Sizes
    params: Sizes


@dataclass(frozen=True)
class Compared:
    """A compact model beside the dense one that it was made of.

    Attributes:
        base_model: what the dense model is called.
        method: how it was pruned.
        ratio: FLOPs reduction: 1 - FLOPs(compact) / FLOPs(dense).
        flops: FLOPs of one sample at the reference input.
        params: parameters; shared ones count once.
        parts: FLOPs and parameters by tower and part.
        layers: every layer.
        stages: where image tokens leave a decoder; left out for other models.
    """

    base_model: str
    method: str
    ratio: float
    flops: Sizes
    params: Sizes
    parts: tuple[PartCompared, ...]
    layers: tuple[LayerCompared, ...]
    stages: tuple[TokensLeft, ...] | None = if_known()


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
        compact: of a compact model, its layers beside the dense ones; left out for a dense one.
        importance: how much heads and channels of a dense model matter; none of a compact one or of a decoder.
        token_importance: how much the tokens of a dense model matter; none of a compact one or of a decoder.
        kept_samples: samples, and which of their tokens stay in a compact model; none where no tokens leave.
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
    compact: Compared | None = if_known()
    importance: tuple[LayerImportance, ...] = ()
    token_importance: tuple[TokenImportance, ...] = ()
    kept_samples: tuple[SampleKept, ...] = ()
    pictures: tuple[Picture, ...] = unwritten(())  # of kept_samples, in their order
