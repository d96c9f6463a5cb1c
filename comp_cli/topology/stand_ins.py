"""Torch modules that stand for parts of a model. Imported where they are needed: the rest of this folder is light."""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..runtime.modeling_comp import refuse_unknown


class Encoded(nn.Module):
    """Stands for a vision tower where the images are encoded already. field: what is read of its output."""

    def __init__(self, field: str):
        super().__init__()
        self.field = field

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        refuse_unknown(self, kwargs)
        made: dict[str, Any] = {self.field: pixel_values}
        return BaseModelOutputWithPooling(**made)


def with_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """A model that has another child under a name, and shares everything else with the given one, which stays as it is."""
    other = copy.copy(model)
    other._modules = model._modules | {name: module}
    return other
