"""The cache of a decoder that image tokens leave: a layer holds what it has kept, and its length is what it has seen. So
positions, masks and slices that transformers derives from a cache are right.

Ships beside compact checkpoints, see modeling_comp_vlm.py.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, StaticLayer

CACHES = ("cache", "past_key_values")  # what stock modules call keys and values, since transformers 5.24 and before


def the_cache(cache: Any, past_key_values: Any) -> Any:
    """The keys and values of earlier tokens, under whichever name they came. Raises TypeError for two of them."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("two caches were given, as cache= and as past_key_values=: give one.")
    return past_key_values if cache is None else cache


def cache_name(forward: Callable[..., Any]) -> str:
    """What a stock forward pass calls its cache. Raises ValueError where it is neither name: it would be lost."""
    name = next((name for name in CACHES if name in inspect.signature(forward).parameters), None)
    if name is None:
        raise ValueError(f"transformers {transformers.__version__}: {forward.__qualname__} takes no cache that is known here.")
    return name


class KeptTokens:
    """Mixed in before a layer of a cache: it holds fewer tokens than it has seen, and its length is what it has seen.

    index, valid, bias: (batch, known), where the first tokens that it holds were, which of them count, and what is added to
    attention logits at them (log of how many tokens each stands for); those behind them are all there, and stand for
    themselves. None where nothing went yet, where all count, or where nothing is added.
    """

    gone: int
    index: Tensor | None
    valid: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Any:
        """The layer with all that it holds."""
        made = cls.__new__(cls)
        vars(made).update(vars(layer))
        made.forget()
        return made

    def forget(self) -> None:
        self.gone, self.index, self.valid, self.bias = 0, None, None, None

    @property
    def held(self) -> int:
        """Tokens that it holds."""
        raise NotImplementedError

    @property
    def seen(self) -> int:
        return self.held + self.gone

    def positions(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where what it holds was, (batch, held), and which of it counts (None for all)."""
        have = self.held
        if self.index is None:
            return torch.arange(have, device=device).expand(batch, -1), None
        known = min(self.index.shape[1], have)
        behind = torch.arange(known, have, device=device) + self.gone
        index = torch.cat([self.index[:, :known], behind.expand(batch, -1)], 1)
        return index, None if self.valid is None else F.pad(self.valid[:, :known], (0, have - known), value=True)

    def biases(self) -> Tensor | None:
        """What is added to attention logits at what it holds, (batch, held); None for nothing."""
        if self.bias is None:
            return None
        known = min(self.bias.shape[1], self.held)
        return F.pad(self.bias[:, :known], (0, self.held - known))

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Samples change their places, as they do in `keys`."""
        for name in ("index", "valid", "bias"):
            if (known := getattr(self, name)) is not None:
                setattr(self, name, change(known))

    def forget_last(self, count: int) -> None:
        """Forget where the last tokens seen were, as long as all of them are held. Raises ValueError where some have gone."""
        left = self.held - count
        if self.index is None or left >= self.index.shape[1]:
            return
        held = left >= 0 and self.index[:, left] == self.seen - count  # the first that is forgotten
        if left >= 0 and self.valid is not None:
            held = held & self.valid[:, left]
        if not bool(torch.as_tensor(held).all()):
            said = f"{count} tokens back would cut into an image, of which some tokens have gone"
            raise ValueError(f"a cache cannot be cropped so far: {said}. Start again with an empty cache.")
        for name in ("index", "valid", "bias"):
            if (known := getattr(self, name)) is not None:
                setattr(self, name, known[:, :left])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.rearrange(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.rearrange(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.rearrange(lambda tensor: tensor[indices])


class KeptLayer(KeptTokens, DynamicLayer):
    """A layer of a cache that grows."""

    @property
    def held(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        self.forget_last(abs(tokens_to_remove))
        super().crop(tokens_to_remove)


class KeptStaticLayer(KeptTokens, StaticLayer):
    """A layer of a cache of fixed size; what has gone before it was filled takes no room."""

    is_compileable = False  # how much it holds is a number of Python's
    count: int

    @classmethod
    def of(cls, layer: Any) -> Any:
        made = super().of(layer)
        made.count = int(layer.cumulative_length)
        return made

    @property
    def held(self) -> int:
        return self.count

    def get_seq_length(self) -> Any:
        return super().get_seq_length() + self.gone

    @property
    def room(self) -> int:
        """Tokens that there is room for: the width of masks."""
        return self.keys.shape[-2] if self.keys is not None else self.max_cache_len - self.gone

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        whole = self.max_cache_len
        self.max_cache_len = whole - self.gone
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = whole

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.count += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """As of a layer that grows. transformers crops static caches since 5.24."""
        self.forget_last(abs(tokens_to_remove))
        super().crop(-abs(tokens_to_remove))  # type: ignore[misc]
        self.count -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized, self.count = False, 0
        self.forget()


def keep_count(cache: Any, first: int, layers: int) -> None:
    """Make the layers of a cache from the first stage on count what they have seen, and all that are of fixed size: for such
    caches transformers makes a mask in every step, but not where one layer holds what it does not know. Raises ValueError for
    kinds of caches in which layers cannot hold different numbers of tokens."""
    if not hasattr(cache, "layers"):
        raise ValueError(
            f"{type(cache).__name__}: image tokens cannot leave with this cache; use a DynamicCache or StaticCache."
        )
    while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:  # a DynamicCache without a config
        cache.layers.append(cache.layer_class_to_replicate())
    kinds: dict[type, type[KeptTokens]] = {DynamicLayer: KeptLayer, StaticLayer: KeptStaticLayer}
    for place, layer in enumerate(cache.layers[:layers]):
        if place < first and type(layer) is not StaticLayer:
            continue
        if type(layer) in kinds:
            cache.layers[place] = kinds[type(layer)].of(layer)
        elif not isinstance(layer, KeptTokens):
            raise ValueError(
                f"{type(layer).__name__}: image tokens cannot leave with this kind of cache (sliding windows, recurrent "
                "states and quantised keys count what they hold). Use the dynamic cache, or cache_implementation='static'."
            )
