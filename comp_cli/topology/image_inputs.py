"""What becomes of a picture on its way into a decoder: its pixels as a model takes them, and how many tokens they are.

A family holds one of these. All sizes are those of one picture, the *reference image*: what the model's own sizes are made for.
Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIXELS = "pixel_values"
CLASS_TOKEN = ("clip_vision_model", "internvl_vision")  # kinds of towers that have a [CLS] before the patches
REFERENCE_SIDE = 1008  # pixels: the image of a model that takes any size, as in papers on Qwen's (1,296 tokens of 28 pixels)

Config = Mapping[str, Any]


class Sizes(NamedTuple):
    """What one picture becomes."""

    sequences: tuple[int, ...]  # tokens of each sequence of the vision tower, which sees itself alone
    patches: int  # that are embedded
    features: int  # that go through the projector
    tokens: int  # image tokens that the decoder reads
    newlines: int = 0  # tokens between the rows, which are no image tokens


class Pictures(ABC):
    """How pictures go into a model."""

    inputs: ClassVar[tuple[str, ...]] = (PIXELS,)  # names, in the order of the class
    square: ClassVar[bool] = False  # whether its tokens are the raster of a square
    prefix: ClassVar[bool] = False  # whether prompts are read in both directions
    rows: ClassVar[Mapping[str, int]] = {}  # what is said of every token besides, (batch, tokens) -> what is said of answers

    @property
    def one_size(self) -> bool:
        """Whether every picture becomes as many tokens as the reference image."""
        return False

    @abstractmethod
    def sizes(self, config: Config) -> Sizes:
        """Of the reference image."""

    @abstractmethod
    def random(self, config: Config, batch: int, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise for `images` reference images in each of `batch` prompts, by the names of `inputs`."""

    @abstractmethod
    def shape(self, config: Config) -> str:
        """Pixels as the model takes them, in words."""

    @abstractmethod
    def fit(self, config: Config, made: Mapping[str, Any]) -> bool:
        """Whether what an image processor makes of one picture has that shape."""

    def apart(self, inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Inputs that have not one row for each of the pictures, and how many rows each has."""
        return {}

    def sequences(self, config: Config, layer: int) -> tuple[int, ...]:
        """Tokens that see each other in a layer of the vision tower."""
        return self.sizes(config).sequences

    def raster(self, config: Config, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int] | None:
        """Rows and columns of the image tokens of one picture, which has `tokens` of them, row by row; None where they are no
        raster, as those of several tiles. inputs: what was made of this picture alone."""
        return None


def side_of(vision: Config) -> int:
    """Pixels of the side of a tile."""
    side = vision["image_size"]
    return side if isinstance(side, int) else side[0]


def patch_of(vision: Config) -> int:
    """Pixels of the side of a patch."""
    patch = vision["patch_size"]
    return patch if isinstance(patch, int) else patch[0]


def has_class_token(vision: Config) -> bool:
    return vision["model_type"] in CLASS_TOKEN


@dataclass(frozen=True)
class Tile(Pictures):
    """Pictures of one size, each of which is one tile of the vision tower: pixel_values (images, 3, side, side).

    merged: attribute of the config by which the sides of the grid of patches are divided (a number above one) or multiplied (a
    ratio) before they are image tokens; None for a token of each patch.
    """

    square: ClassVar[bool] = True
    merged: str | None = None

    @property
    def one_size(self) -> bool:
        return self.merged is None  # processors of the others cut pictures into tiles

    def sizes(self, config: Config) -> Sizes:
        vision = config["vision_config"]
        patches = self.grid(vision) ** 2
        ratio = config[self.merged] if self.merged else 1
        tokens = round(self.grid(vision) * ratio) ** 2 if ratio < 1 else (self.grid(vision) // ratio) ** 2
        return Sizes((patches + has_class_token(vision),), patches, tokens, tokens)

    def grid(self, vision: Config) -> int:
        """Patches along a side."""
        return side_of(vision) // patch_of(vision)

    def raster(self, config: Config, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int] | None:
        side = math.isqrt(tokens)
        return (side, side) if self.square and tokens == self.sizes(config).tokens == side**2 else None

    def random(self, config: Config, batch: int, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        side = side_of(config["vision_config"])
        return {PIXELS: torch.randn(batch * images, 3, side, side, generator=generator)}

    def shape(self, config: Config) -> str:
        side = side_of(config["vision_config"])
        return f"tiles of (3, {side}, {side})"

    def fit(self, config: Config, made: Mapping[str, Any]) -> bool:
        side = side_of(config["vision_config"])
        return tuple(made[PIXELS].shape[-3:]) == (3, side, side)


@dataclass(frozen=True)
class TileOfPrefix(Tile):
    """The same, for a decoder that reads image and question in both directions (PaliGemma): token_type_ids are 1 for what is
    read in one."""

    prefix: ClassVar[bool] = True
    rows: ClassVar[Mapping[str, int]] = {"token_type_ids": 1}


@dataclass(frozen=True)
class TilesOfPrompts(Tile):
    """The same, tiles of a prompt together, tiles of zeros where others have more: pixel_values (batch, tiles, 3, side, side),
    pixel_attention_mask (batch, tiles, side, side)."""

    inputs: ClassVar[tuple[str, ...]] = (PIXELS, "pixel_attention_mask")

    @property
    def one_size(self) -> bool:
        return False  # a large picture is read in several tiles

    def random(self, config: Config, batch: int, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        pixels = super().random(config, batch, images, generator)[PIXELS]
        pixels = pixels.view(batch, images, *pixels.shape[1:])
        mask = torch.ones(batch, images, *pixels.shape[-2:], dtype=torch.bool)
        return {PIXELS: pixels, "pixel_attention_mask": mask}


@dataclass(frozen=True)
class AnyResolution(Tile):
    """A picture is read whole and in tiles of the best of some sizes (LLaVA-NeXT): pixel_values (images, tiles, 3, side, side),
    image_sizes (images, 2). Behind every row of patches stands a newline.

    The reference image is of two by two tiles, if that is among the sizes; else of the largest of them.
    """

    square: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = (PIXELS, "image_sizes")

    @property
    def one_size(self) -> bool:
        return False  # a large picture is read in several tiles

    def reference(self, config: Config) -> tuple[int, int]:
        """Height and width of the reference image."""
        side, known = side_of(config["vision_config"]), [tuple(size) for size in config["image_grid_pinpoints"]]
        square = (2 * side, 2 * side)
        return square if square in known else max(known, key=math.prod)

    def sizes(self, config: Config) -> Sizes:
        vision = config["vision_config"]
        grid, (height, width) = self.grid(vision), self.reference(config)
        down, across = height // side_of(vision), width // side_of(vision)
        tiles = 1 + down * across
        rows, columns = self.shrunk(config, down * grid, across * grid)
        sequence = grid**2 + has_class_token(vision)
        return Sizes((sequence,) * tiles, tiles * grid**2, tiles * grid**2, grid**2 + rows * columns, rows)

    def shrunk(self, config: Config, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the patches of all tiles, as the decoder reads them: LLaVA-OneVision makes fewer of many."""
        limit = config.get("vision_aspect_ratio")
        if not isinstance(limit, str) or not limit.startswith("anyres_max_"):
            return rows, columns
        ratio = math.sqrt(rows * columns / (int(limit.removeprefix("anyres_max_")) * self.grid(config["vision_config"]) ** 2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def random(self, config: Config, batch: int, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        side, number = side_of(config["vision_config"]), batch * images
        tiles = len(self.sizes(config).sequences)
        return {
            PIXELS: torch.randn(number, tiles, 3, side, side, generator=generator),
            "image_sizes": torch.tensor([self.reference(config)] * number),
        }


@dataclass(frozen=True)
class AnySize(Pictures):
    """Pictures of any size, cut into patches that stand one behind the other (Qwen-VL): pixel_values (patches, 3 * frames *
    patch * patch), image_grid_thw (images, 3). The decoder is told which tokens are of images: mm_token_type_ids.

    The reference image is a square of 1008 pixels, rounded to whole image tokens, or of as many as fill half of the positions
    that the decoder has, if these are fewer.
    """

    inputs: ClassVar[tuple[str, ...]] = (PIXELS, "image_grid_thw")
    rows: ClassVar[Mapping[str, int]] = {"mm_token_type_ids": 0}

    def apart(self, inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return {PIXELS: inputs["image_grid_thw"].prod(1).tolist()}

    def side(self, config: Config) -> int:
        """Image tokens along a side of the reference image."""
        vision = config["vision_config"]
        token = patch_of(vision) * vision["spatial_merge_size"]
        return min(round(REFERENCE_SIDE / token), math.isqrt(config["text_config"]["max_position_embeddings"] // 2))

    def sizes(self, config: Config) -> Sizes:
        tokens = self.side(config) ** 2
        patches = tokens * config["vision_config"]["spatial_merge_size"] ** 2
        return Sizes((patches,), patches, tokens, tokens)

    def sequences(self, config: Config, layer: int) -> tuple[int, ...]:
        """Of Qwen2.5-VL most layers see windows alone."""
        vision = config["vision_config"]
        if layer in vision.get("fullatt_block_indexes", (layer,)):
            return self.sizes(config).sequences
        side, merge = self.side(config), vision["spatial_merge_size"]
        window = vision["window_size"] // patch_of(vision) // merge
        sides = [min(window, side - start) for start in range(0, side, window)]
        return tuple(height * width * merge**2 for height in sides for width in sides)

    def random(self, config: Config, batch: int, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        number, grid = batch * images, self.side(config) * config["vision_config"]["spatial_merge_size"]
        return {
            PIXELS: torch.randn(number * grid**2, self.numbers(config), generator=generator),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * number),
        }

    def raster(self, config: Config, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int] | None:
        merge = config["vision_config"]["spatial_merge_size"]
        _, rows, columns = (int(number) for number in inputs["image_grid_thw"][0])
        return rows // merge, columns // merge

    def numbers(self, config: Config) -> int:
        """Numbers of a patch: colours, frames, pixels."""
        vision = config["vision_config"]
        return vision["in_channels"] * vision["temporal_patch_size"] * patch_of(vision) ** 2

    def shape(self, config: Config) -> str:
        return f"patches of {self.numbers(config)} numbers"

    def fit(self, config: Config, made: Mapping[str, Any]) -> bool:
        merge = config["vision_config"]["spatial_merge_size"]
        whole = all(int(side) % merge == 0 for side in made["image_grid_thw"].flatten()[1:])
        return made[PIXELS].shape[-1] == self.numbers(config) and whole
