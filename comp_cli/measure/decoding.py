"""What the bench times of a decoder that reads images: its prompt, its first token, the tokens behind it; and the cache.

Every runner returns when the work is done, and leaves nothing behind: the same run costs the same each time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.kept_cache import cache_name
from .timing import Inputs, Runner

STEPS = 8  # tokens of one timed run of decoding


def precision(device: torch.device) -> torch.dtype | None:
    """On a GPU models run in the precision of their checkpoints (None); on a CPU, where half precision is slow, in fp32."""
    return torch.float32 if device.type == "cpu" else None


def prompt_of(inputs: Inputs) -> Inputs:
    """Inputs of a prompt alone, of those of a prompt with an answer behind it that is predicted: nothing is an answer."""
    without = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    return without | {name: torch.zeros_like(tensor) for name, tensor in without.items() if name == "token_type_ids"}


def placed(inputs: Inputs, like: Tensor) -> Inputs:
    """Inputs where a weight is, pixels in its precision."""
    return {name: t.to(like.device, like.dtype if t.is_floating_point() else None) for name, t in inputs.items()}


def synchronised(run: Callable[[], Any], device: torch.device) -> Any:
    """What a call returns, when its work is done."""
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def weight_of(model: Any) -> Tensor:
    weight: Tensor = next(model.parameters())
    return weight


def read(model: Any, prompt: Inputs) -> Any:
    """The forward pass over a prompt with its images, logits of the last token only, into a new cache."""
    with torch.inference_mode():
        return model(**placed(prompt, weight_of(model)), use_cache=True, logits_to_keep=1)


def prefill_runner(model: Any) -> Runner:
    return lambda prompt: synchronised(lambda: read(model, prompt), weight_of(model).device)


def first_token_runner(model: Any) -> Runner:
    """`generate` of one token: images encoded, prompt read, a token chosen."""

    def run(prompt: Inputs) -> None:
        weight = weight_of(model)
        options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
        with torch.inference_mode():
            synchronised(lambda: model.generate(**placed(prompt, weight), **options), weight.device)

    return run


class Steps:
    """A runner that writes STEPS tokens behind a prompt that was read before, one by one, and takes them back."""

    def __init__(self, model: Any, prompt: Inputs):
        found = read(model, prompt)
        self.model, self.name = model, cache_name(model.forward)
        self.cache = found[self.name]
        self.token = found.logits[:, -1:].argmax(-1)

    def __call__(self, inputs: Inputs) -> None:
        synchronised(self._write, self.token.device)
        self.cache.crop(-STEPS)

    def _write(self) -> None:
        token = self.token
        with torch.inference_mode():
            for _ in range(STEPS):
                found = self.model(input_ids=token, **{self.name: self.cache}, use_cache=True, logits_to_keep=1)
                token = found.logits[:, -1:].argmax(-1)


def count_flops(model: Any, prompt: Inputs) -> tuple[int, int]:
    """FLOPs of a prompt and of one token behind it, counted from what runs (the math attention kernel shows its matmuls to the
    counter, those of pairs that a causal mask hides among them)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        with FlopCounterMode(display=False) as whole:
            found = read(model, prompt)
        token = found.logits[:, -1:].argmax(-1)
        with FlopCounterMode(display=False) as step:
            name = cache_name(model.forward)
            model(input_ids=token, **{name: found[name]}, use_cache=True, logits_to_keep=1)
    return whole.get_total_flops(), step.get_total_flops()


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
