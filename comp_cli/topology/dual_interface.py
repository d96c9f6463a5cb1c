"""Dual encoders in classes that are none by themselves: the halves of a model, in the words of CLIPModel."""

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from .base import Halves


class DualInterface:
    """Mixed in before a stock or compact class. In memory only: what is written stays a model of its own class."""

    halves: Halves
    device: torch.device  # of the class that this is mixed into, as is
    get_submodule: Callable[[str], nn.Module]

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """(images, 3, side, side) -> pooler_output (images, dim), not normalised."""
        return self._pooled(*self.halves.images, pixel_values=pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """(texts, tokens) each -> pooler_output (texts, dim), not normalised."""
        return self._pooled(*self.halves.texts, input_ids=input_ids, attention_mask=attention_mask)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> CLIPOutput:
        """Any number of images and of texts. Embeddings of length 1; logits are cosines over the temperature."""
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        images, texts = (F.normalize(cast(Tensor, half.pooler_output), dim=-1) for half in (image, text))
        logits = texts @ images.T / self.halves.temperature
        return CLIPOutput(logits_per_image=logits.T, logits_per_text=logits, text_embeds=texts, image_embeds=images)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what a cosine is multiplied with."""
        return -torch.tensor(self.halves.temperature, device=self.device).log()

    def _pooled(self, encoder: str, projection: str, **inputs: Tensor | None) -> BaseModelOutputWithPooling:
        states = self.get_submodule(encoder)(**inputs).last_hidden_state
        return BaseModelOutputWithPooling(states, self.get_submodule(projection)(states[:, 0]))


@cache
def dual_class(model_class: type, halves: Halves) -> type:
    """A child of the class, of the same name, that answers as CLIPModel does."""
    members = {"halves": halves, "__module__": model_class.__module__}
    return type(model_class.__name__, (DualInterface, model_class), members)
