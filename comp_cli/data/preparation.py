"""What an image processor of transformers does to a picture, as data: for whatever does the same without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


class NotKnownError(ValueError):
    """A processor does something that is not described here; the message says what, as the end of a sentence."""


@dataclass(frozen=True)
class Preparation:
    """The steps, in their order. Of an upright RGB picture they make (3, *shape).

    size: (height, width) that it is resized to, whatever its own; None where `edge` says it, or nothing is resized.
    edge: pixels that the shorter side becomes, the other one in proportion, rounded down.
    filter: of the resizing, one of Pillow's.
    crop: (height, width) of the middle that is taken, with black around it where the picture is smaller; None for all of it.
    factor: what grey levels, 0 to 255, are multiplied with; None for nothing.
    mean, std: of each channel, or of all: subtracted, and divided by; None for nothing.
    """

    size: tuple[int, int] | None
    edge: int | None
    filter: Image.Resampling
    crop: tuple[int, int] | None
    factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        shape = self.crop or self.size
        assert shape is not None  # see `preparation_of`
        return shape


def preparation_of(processor: Any) -> Preparation:
    """What an image processor does to a picture of any size. Raises NotKnownError for steps that are not described here."""
    resizes, crops, rescales, normalizes, pads = (
        getattr(processor, f"do_{step}", False) for step in ("resize", "center_crop", "rescale", "normalize", "pad")
    )
    if pads:
        raise NotKnownError("pads pictures")
    size, crop = (_known(getattr(processor, name, None)) for name in ("size", "crop_size"))
    if crops and crop.keys() != {"height", "width"}:
        raise NotKnownError(f"crops to {crop or 'no size'}")
    if not resizes and not crops:
        raise NotKnownError("leaves pictures in their own sizes")
    edge = size.get("shortest_edge") if resizes and crops and size.keys() == {"shortest_edge"} else None
    if resizes and edge is None and size.keys() != {"height", "width"}:
        raise NotKnownError(f"resizes to {size or 'no size'}{'' if crops else ' and does not crop'}")
    filtering = getattr(processor, "resample", None)
    if filtering is None:
        filtering = Image.Resampling.BILINEAR  # as transformers chooses
    elif resizes and not isinstance(filtering, int):
        raise NotKnownError(f"resizes with {filtering!r}")
    mean, std = (
        tuple(np.ravel(getattr(processor, f"image_{name}")).tolist()) if normalizes else None for name in ("mean", "std")
    )
    return Preparation(
        size=(size["height"], size["width"]) if resizes and edge is None else None,
        edge=edge,
        filter=Image.Resampling(filtering),
        crop=(crop["height"], crop["width"]) if crops else None,
        factor=processor.rescale_factor if rescales else None,
        mean=mean,
        std=std,
    )


def _known(sizes: Mapping[str, int | None] | None) -> dict[str, int]:
    """Sizes that are said."""
    return {name: size for name, size in dict(sizes or {}).items() if size}
