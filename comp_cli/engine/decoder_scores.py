"""Token scores of a decoder that reads images, while it stays as it is: what its last instruction token pays attention to.

The layers are stock ones and make no attention maps; queries and keys are heard as the runtime hears them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Tower
from ..runtime.token_selection import Heard, sources_of
from .importance import normalised


class Prompts:
    """What a model is given: (batch, tokens) each. pictured: which tokens are of an image; real: which are no padding; last:
    (batch, 1), the last token before what is to be predicted."""

    pictured: Tensor
    real: Tensor
    last: Tensor

    def read(self, model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Before a forward pass."""
        ids, labels, mask = given["input_ids"], given.get("labels"), given.get("attention_mask")
        kinds = (getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        placeholders = torch.tensor([token for token in kinds if token is not None], device=ids.device)
        self.pictured = torch.isin(ids, placeholders)
        self.real = torch.ones_like(self.pictured) if mask is None else mask.bool()
        asked = self.real if labels is None else self.real & (labels == -100)
        place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        self.last = (asked * place).amax(1, keepdim=True).clamp(min=1) - 1


def weights(scores: Tensor, pictured: Tensor, weighted: bool) -> Tensor:
    """Token weights of a decoder's activations, (batch, tokens), by modality: of image tokens their scores, which sum to one
    (CIP, CoMP, Eq. 4), of the words of the prompt, which always stay, the same for each, in all one as well."""
    valid = scores >= 0
    if not weighted:
        return valid.float()
    words = (valid & ~pictured).float()
    return normalised(scores.masked_fill(~pictured, 0)) + normalised(words)


@contextmanager
def listening(
    model: nn.Module, tower: Tower, layers: nn.ModuleList, remember: Callable[[int, Tensor], None]
) -> Iterator[Prompts]:
    """While the context is open, hand to `remember` of each layer the attention of the last instruction token, (batch, tokens),
    mean over heads, padding negative; in what it is asked, the tokens of images."""
    prompts = Prompts()
    hooks = [model.register_forward_pre_hook(prompts.read, with_kwargs=True)]
    module = tower.self_attention.module

    def before(heard: dict[str, Any]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            attention: Any = layer.get_submodule(module)
            mask, turned = given.get("attention_mask"), given["position_embeddings"]
            heard["now"] = Heard(attention.head_dim, attention.scaling, turned, mask, None)

        return hook

    def keep(heard: dict[str, Any], name: str) -> Callable[..., None]:
        return lambda projection, args, output: setattr(heard["now"], name, output.detach())

    def behind(heard: dict[str, Any], index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            with torch.no_grad():
                paid = heard.pop("now").attention_from(prompts.last)[:, 0]
            remember(index, paid.masked_fill(~prompts.real, -1.0))

        return hook

    try:
        for index, layer in enumerate(layers):
            heard: dict[str, Any] = {}
            attention: Any = layer.get_submodule(module)
            hooks.append(layer.register_forward_pre_hook(before(heard), with_kwargs=True))
            for name, source in zip(("query", "key"), sources_of(attention), strict=True):
                hooks.append(source.register_forward_hook(keep(heard, name)))
            hooks.append(layer.register_forward_hook(behind(heard, index)))
        yield prompts
    finally:
        for hook in hooks:
            hook.remove()
