"""Shapes of models, and what each can do. One class for each; a family's description holds one of them."""

from .base import INPUTS, Halves, Topology, input_sizes, with_one_image
from .cross_encoder import CrossEncoder
from .dual_encoder import DualEncoder
from .encoder_decoder import ANSWER_INPUTS, EncoderDecoder
from .single_encoder import SingleEncoder

__all__ = [
    "ANSWER_INPUTS",
    "INPUTS",
    "CrossEncoder",
    "DualEncoder",
    "EncoderDecoder",
    "Halves",
    "SingleEncoder",
    "Topology",
    "input_sizes",
    "with_one_image",
]
