"""What reports say of sample images and texts: which of their tokens each layer hands on, and how much units and tokens matter.

In the documents of `comp prune` and `comp analyze`; pages and pictures are drawn from them.
"""

from dataclasses import dataclass
from typing import Any

from .base import if_known


@dataclass(frozen=True)
class KeptAt:
    """Tokens that are still there at a layer where some leave.

    Attributes:
        layer: index of the layer in its tower.
        kept: those that are left, as indices into the patches or words of the stream, in their order. Tokens that are none of
            these ([CLS], [SEP], padding, and the one token that stands for all that left in CLIP) are not listed.
        stands_for: how many patches each of `kept` stands for from there on, where a rule lets tokens be the mean of others and
            says how many; left out elsewhere.
        merged: how many tokens stand beside them for the patches that left, each for many: 1 in CLIP; 0 elsewhere.
    """

    layer: int
    kept: tuple[int, ...]
    stands_for: tuple[float, ...] | None = if_known()
    merged: int = 0


@dataclass(frozen=True)
class StreamKept:
    """Which tokens of a stream of one sample stay, layer by layer.

    Attributes:
        stream: name of the stream.
        tower: name of the tower whose layers are meant.
        kind: "image" or "text".
        at: "behind" (tokens leave inside these layers, and `kept` are those that the layer hands on) or "before" (they leave in
            front of these layers, as in decoders that read images).
        layers_of_tower: how many layers the tower has.
        tokens: patches or words that enter the tower.
        grid: rows and columns of the patches, row by row from the top left; null for a text, and for an image whose tokens are
            no raster.
        words: the words, as the tokenizer cuts them, without [CLS], [SEP] and padding; null for an image.
        layers: the layers where something leaves, in their order.
    """

    stream: str
    tower: str
    kind: str
    at: str
    layers_of_tower: int
    tokens: int
    grid: tuple[int, int] | None
    words: tuple[str, ...] | None
    layers: tuple[KeptAt, ...]


@dataclass(frozen=True)
class SampleKept:
    """A sample, and which of its tokens stay. It comes from a run of the compact model.

    Attributes:
        text: the text that the model read with it; empty where it reads none.
        streams: the streams in which tokens leave.
        said: what the compact model says: the text that it writes, or how well image and text fit (the task's score); left out
            where it says nothing that can be read.
    """

    text: str
    streams: tuple[StreamKept, ...]
    said: str | None = if_known()


@dataclass(frozen=True)
class LayerImportance:
    """How much the heads or channels of a layer matter, in units of the mean head or channel of that layer (1 is the mean).

    Attributes:
        tower: name of the tower.
        layer: index of the layer in it.
        part: "attention", "cross" (cross-attention) or "ffn" (feed-forward).
        units: how many heads or channels there are.
        values: of heads each in its place; of channels the means of up to 32 groups of equally many, sorted from the most
            important down.
    """

    tower: str
    layer: int
    part: str
    units: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class TokenImportance:
    """How much the patches of an image, or the places of a text, matter to a layer: the score that ranks them, in units of
    the mean of all ordinary tokens of a sample (1 is the mean), mean over the calibration samples that have the place.

    Attributes:
        stream: name of the stream.
        layer: index of the layer in its tower.
        grid: rows and columns of the patches; null for a text.
        values: of each patch row by row, or of each place of a text, [CLS] left out.
    """

    stream: str
    layer: int
    grid: tuple[int, int] | None
    values: tuple[float, ...]


Picture = Any  # PIL.Image.Image of a sample, as the model sees it: at most 336 pixels a side; None for a sample without one
