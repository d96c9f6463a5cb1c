"""Shapes of models, and what each can do. One class for each; a family's description holds one of them."""

from .base import INPUTS, Halves, Pixels, Topology, input_sizes, with_one_image
from .cross_encoder import CrossEncoder
from .dual_encoder import DualEncoder
from .encoder_decoder import ANSWER_INPUTS, EncoderDecoder
from .image_inputs import AnyResolution, AnySize, Tile, TileOfPrefix, TilesOfPrompts
from .image_text_decoder import ImageTextDecoder
from .single_encoder import SingleEncoder

__all__ = [
    "ANSWER_INPUTS",
    "INPUTS",
    "AnyResolution",
    "AnySize",
    "CrossEncoder",
    "DualEncoder",
    "EncoderDecoder",
    "Halves",
    "ImageTextDecoder",
    "Pixels",
    "SingleEncoder",
    "Tile",
    "TileOfPrefix",
    "TilesOfPrompts",
    "Topology",
    "input_sizes",
    "with_one_image",
]
