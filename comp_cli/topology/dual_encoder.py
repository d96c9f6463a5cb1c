"""Dual encoders made of classes that are none by themselves: the halves of a model, in the words of CLIPModel."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from ..families.base import Dual, Family


class DualEncoder:
    """Mixed in before a stock or compact class. In memory only: what is written stays a model of its own class."""

    dual: Dual

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """(images, 3, side, side) -> pooler_output (images, dim), not normalised."""
        return self._pooled(*self.dual.images, pixel_values=pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """(texts, tokens) each -> pooler_output (texts, dim), not normalised."""
        return self._pooled(*self.dual.texts, input_ids=input_ids, attention_mask=attention_mask)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> CLIPOutput:
        """Any number of images and of texts. Embeddings of length 1; logits are cosines over the temperature."""
        encoded = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        images, texts = (F.normalize(half.pooler_output, dim=-1) for half in encoded)
        logits = texts @ images.T / self.dual.temperature
        return CLIPOutput(logits_per_image=logits.T, logits_per_text=logits, text_embeds=texts, image_embeds=images)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what a cosine is multiplied with."""
        return -torch.tensor(self.dual.temperature, device=self.device).log()

    def _pooled(self, encoder: str, projection: str, **inputs: Tensor) -> BaseModelOutputWithPooling:
        states = self.get_submodule(encoder)(**inputs).last_hidden_state
        return BaseModelOutputWithPooling(states, self.get_submodule(projection)(states[:, 0]))


@cache
def _dual_class(model_class: type, dual: Dual) -> type:
    return type(f"Dual{model_class.__name__}", (DualEncoder, model_class), {"dual": dual, "__module__": __name__})


def with_dual_interface(model: nn.Module, family: Family | None) -> nn.Module:
    """The same model, with the methods that a family names where its class does not have them."""
    if family and family.dual:
        model.__class__ = _dual_class(type(model), family.dual)
    return model
