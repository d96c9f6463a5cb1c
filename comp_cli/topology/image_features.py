"""Image features as a graph makes them, (images, tokens, dim) of pixels (images, 3, side, side): the tower and the projector,
with nothing in Python that counts images. Torch is not imported before it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def through_projector(inner: Any, pixels: Tensor) -> Tensor:
    """Of LLaVA: some hidden states of the tower, without [CLS], side by side, and a projector. inner: the multimodal model."""
    import torch

    config = inner.config
    states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    read = [states[layer] for layer in (layers if isinstance(layers, list | tuple) else [layers])]
    if config.vision_feature_select_strategy == "default":
        read = [part[:, 1:] for part in read]
    made: Tensor = inner.multi_modal_projector(torch.cat(read, -1))
    return made


def of_the_last_layer(inner: Any, pixels: Tensor) -> Tensor:
    """Of PaliGemma: what the tower hands out, and a projector."""
    made: Tensor = inner.multi_modal_projector(inner.vision_tower(pixels).last_hidden_state)
    return made
