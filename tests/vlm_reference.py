"""Image tokens that leave a decoder, written again: slow, one sample, eager, nothing is ever removed.

A stock model runs as it is, with every token in every layer. From the layer on before which a token leaves, its key is masked
with -inf for everybody else. What tokens are ranked by is read from that run: keys behind the rotation from the cache, and
attention from eager maps. `naive_llava` does the same without a line of transformers in the decoder. Shares no code with comp.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

Stage = dict[str, Any]  # as in config.json: layer, rule, keep or share, settings


@dataclass(frozen=True)
class Seen:
    """What ranks tokens before a layer, of the n tokens that are read now."""

    keys: Tensor | None  # (groups, n, head_dim) of the layer before, rotated
    last: Tensor | None  # (n,): attention of the last token in the layer before, mean over heads
    tower: Tensor  # (n,): attention of the tower's [CLS]; 0 where no patch is


RANKS: dict[str, Callable[[Seen], Tensor]] = {  # the highest stay
    "key-norm": lambda seen: -seen.keys.float().mean(0).norm(dim=-1),
    "last-attention": lambda seen: seen.last,
    "cls-clusters": lambda seen: seen.tower,
    "tail": lambda seen: torch.arange(len(seen.tower)).float(),  # of the tests' own: the last ones of each image
    "doubled-tail": lambda seen: torch.arange(len(seen.tower)).float(),  # and their states are doubled
}


def stay(stage: Stage, image: Sequence[int], scores: Tensor, gone: Tensor) -> list[int]:
    """Of one image's tokens the best that are still there; the first of equal ones."""
    count = stage["keep"] if "keep" in stage else math.ceil(len(image) * stage["share"])
    return sorted((place for place in image if not gone[place]), key=lambda place: (-scores[place].item(), place))[:count]


class Reference:
    """A conversation with a stock model under stages. text: the decoder's path."""

    def __init__(self, model: Any, text: str, stages: Sequence[Stage]):
        self.model, self.stages = model, {stage["layer"]: stage for stage in stages}
        self.layers = model.get_submodule(text).layers
        self.cache = DynamicCache()
        self.gone = [torch.zeros(0, dtype=torch.bool) for _ in self.layers]  # of all that was seen, for each layer
        self.deltas = None  # what Qwen remembers between calls
        self.entered: list[Tensor] = []  # (n, dim) of the last call: hidden states that enter each layer
        self.maps: list[Tensor] = []  # (n, seen) of the last call: attention in each layer, mean over heads

    @torch.no_grad()
    def read(self, sample: Any, tower: Sequence[Tensor] = (), asked: int | None = None, **inputs: Any) -> Tensor:
        """Logits (n, vocabulary) of a prompt. tower: of each image the attention of [CLS] to its patches. asked: its first
        tokens that are a prompt; what follows is an answer."""
        scores = torch.zeros(len(sample.ids))
        for image, row in zip(sample.images, tower, strict=bool(tower)):
            scores[list(image)] = row
        return self._run(sample.inputs | inputs, sample.images, sample.newlines, scores, asked)

    @torch.no_grad()
    def write(self, tokens: Sequence[int]) -> Tensor:
        """Logits (n, vocabulary) of tokens behind what was read; they are remembered."""
        return self._run({"input_ids": torch.tensor([list(tokens)])}, (), (), torch.zeros(len(tokens)))

    def after(self, tokens: Sequence[int]) -> Tensor:
        """The same, and forgotten again."""
        logits = self.write(tokens)
        self.forget(len(tokens))
        return logits

    def forget(self, count: int) -> None:
        """As if the last `count` tokens had never been."""
        self.cache.crop(-count)
        self.gone = [gone[: len(gone) - count] for gone in self.gone]

    def _run(self, inputs: dict[str, Any], images: Any, newlines: Any, tower: Tensor, asked: int | None = None) -> Tensor:
        new = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)  # which of the new ones are gone by now
        self.entered, self.maps = [], []
        before = partial(self._before, images=images, newlines=newlines, tower=tower, new=new, asked=asked or len(new))
        hooks = [layer.register_forward_pre_hook(partial(before, i), with_kwargs=True) for i, layer in enumerate(self.layers)]
        hooks += [layer.self_attn.register_forward_hook(self._attended) for layer in self.layers]
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = self.deltas
        try:
            logits = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        self.deltas = getattr(self.model.model, "rope_deltas", None)
        return logits

    def _attended(self, attention, args, output):
        self.maps.append(output[1][0].float().mean(0))

    def _before(self, place, layer, args, kwargs, *, images, newlines, tower, new, asked):
        hidden = args[0]
        self.entered.append(hidden[0])
        stage = self.stages.get(place)
        if stage and images:
            keys = self.cache.layers[place - 1].keys[0][:, -len(new) :] if place else None
            last = self.maps[-1][asked - 1, -len(new) :] if place else None
            scores = RANKS[stage["rule"]](Seen(keys, last, tower))
            kept = [place for image in images for place in stay(stage, image, scores, new)]
            new[[place for image in images for place in image] + list(newlines)] = True
            new[kept] = False
            if stage["rule"] == "doubled-tail":
                hidden = hidden.clone()
                hidden[:, kept] *= 2
        self.gone[place] = torch.cat([self.gone[place], new])
        # One that is gone sees itself: its row has to be something, and nobody reads it.
        own = torch.eye(len(self.gone[place]), dtype=torch.bool)[-len(new) :]
        mask = kwargs["attention_mask"].masked_fill(self.gone[place] & ~own, -torch.inf)
        return (hidden, *args[1:]), kwargs | {"attention_mask": mask}


@torch.no_grad()
def greedy(reference: Reference, logits: Tensor, steps: int, suppressed: Sequence[int]) -> tuple[list[int], Tensor]:
    """Tokens, and the logits (steps, vocabulary) that they were taken from. logits: (vocabulary,) behind the prompt."""
    tokens: list[int] = []
    found = []
    for _ in range(steps):
        found.append(logits)
        tokens.append(best(logits, suppressed))
        logits = reference.write(tokens[-1:])[-1]
    return tokens, torch.stack(found)


def best(logits: Tensor, suppressed: Sequence[int]) -> int:
    return int(logits.index_fill(0, torch.tensor(suppressed), -torch.inf).argmax())


def beams(reference: Reference, logits: Tensor, steps: int, suppressed: Sequence[int], count: int) -> list[int]:
    """The best of `count` beams, none of which ends early."""
    alive: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(steps):
        longer = []
        for tokens, score in alive:
            row = (reference.after(tokens)[-1] if tokens else logits).log_softmax(-1)
            row = row.index_fill(0, torch.tensor(suppressed), -torch.inf)
            longer += [(tokens + [int(token)], score + float(row[token])) for token in row.topk(count).indices]
        alive = sorted(longer, key=lambda beam: -beam[1])[:count]
    return alive[0][0]


# The decoder of LLaVA without transformers


def rms(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x, (heads, n, head_dim): pairs (i, i + half) turn by position / theta^(2i / head_dim)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@torch.no_grad()
def naive_llava(model: Any, sample: Any, stages: Sequence[Stage], tower: Sequence[Tensor] = ()) -> Tensor:
    """Logits (n, vocabulary). Only the image features come from transformers."""
    text, config = model.model.language_model, model.config.text_config
    heads, groups, n = config.num_attention_heads, config.num_key_value_heads, len(sample.ids)
    h = text.embed_tokens.weight[torch.tensor(sample.ids)].clone()
    for image, picture in zip(sample.images, sample.pictures, strict=True):
        h[list(image)] = model.model.get_image_features(**picture.inputs).pooler_output[0]
    gone, chosen = torch.zeros(n, dtype=torch.bool), {stage["layer"]: stage for stage in stages}
    norms = last = None
    for i, layer in enumerate(text.layers):
        if i in chosen and sample.images:
            for number, image in enumerate(sample.images):
                scores = torch.zeros(n)
                if chosen[i]["rule"] == "cls-clusters":
                    scores[list(image)] = tower[number]
                else:
                    scores = {"key-norm": norms, "last-attention": last}[chosen[i]["rule"]]
                kept = stay(chosen[i], image, scores, gone)
                gone[list(image)] = True
                gone[kept] = False
        attention, x = layer.self_attn, rms(h, layer.input_layernorm)
        q, k, v = (
            (x @ part.weight.T).view(n, count, -1).transpose(0, 1)
            for part, count in ((attention.q_proj, heads), (attention.k_proj, groups), (attention.v_proj, groups))
        )
        norms = -k.mean(0).norm(dim=-1)  # a rotation changes no norm
        q, k = turned(q, config.rope_parameters["rope_theta"]), turned(k, config.rope_parameters["rope_theta"])
        k, v = k.repeat_interleave(heads // groups, 0), v.repeat_interleave(heads // groups, 0)
        seen = torch.ones(n, n, dtype=torch.bool).tril() & (~gone | torch.eye(n, dtype=torch.bool))
        maps = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        last = maps.mean(0)[-1]
        h = h + (maps @ v).transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
        x, mlp = rms(h, layer.post_attention_layernorm), layer.mlp
        h = h + (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return rms(h, text.norm) @ model.lm_head.weight.T
