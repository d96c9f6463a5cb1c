"""How image tokens leave a decoder in a search: the stages of a layer and a number of tokens."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import UsageError
from ..plan import TokenStage
from .token_schedules import stages

# Where CoMP's stages are, by shares of the layers from the first one on, and what stays of its tokens: PyramidDrop's
# published layers 2, 8 and 16 of 32, and its halves.
PLACES, KEPT = (0.0, 0.2, 7 / 15), (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Leaving:
    """How image tokens leave a decoder.

    method: of token_schedules.TOKEN_METHODS, whose stages follow from a number of tokens alone; None for CoMP's own: three
    stages from a layer on, ranked by attention from the last instruction token (as PyramidDrop's, arXiv 2410.17247).
    image_tokens: of the reference image. layers: of the decoder. class_token, clip: of the vision tower. fixed_size:
    whether all images have as many tokens as the reference image; where not, stages keep shares. seed: of random tokens.
    """

    method: str | None
    image_tokens: int
    layers: int
    class_token: bool
    clip: bool
    fixed_size: bool
    seed: int = 0

    @property
    def depths(self) -> int:
        """In how many places tokens may begin to leave."""
        return 1 if self.method else max(1, self.layers - 3)

    def stages(self, layer: int, tokens: int) -> tuple[TokenStage, ...]:
        """The stages behind a layer. tokens: that stay at the first of CoMP's; of another method what it calls so. Raises
        UsageError where a method has no such stages."""
        found = self._own(layer + 1, tokens) if self.method is None else self._of_method(tokens)
        return found if self.fixed_size else tuple(self._as_share(stage) for stage in found)

    def _own(self, first: int, tokens: int) -> tuple[TokenStage, ...]:
        places = [first + max(number, round(place * (self.layers - first))) for number, place in enumerate(PLACES)]
        counts = [round(tokens * kept) for kept in KEPT]
        return tuple(TokenStage(place, "last-attention", count) for place, count in zip(places, counts, strict=True))

    def _of_method(self, tokens: int) -> tuple[TokenStage, ...]:
        assert self.method is not None
        found = stages(
            self.method,
            tokens=tokens,
            share=None,
            image_tokens=self.image_tokens,
            layers=self.layers,
            class_token=self.class_token,
            clip=self.clip,
            fixed_size=True,
        )
        return tuple(replace(stage, settings={"seed": self.seed}) if stage.rule == "random" else stage for stage in found)

    def _as_share(self, stage: TokenStage) -> TokenStage:
        """Not more than the number, which rounding up makes of the share."""
        return replace(stage, keep=None, share=math.floor(1e6 * (stage.keep or 0) / self.image_tokens) / 1e6)

    @cached_property
    def possible(self) -> frozenset[int]:
        """The numbers of tokens that the method has stages for."""
        return frozenset(tokens for tokens in range(1, self.image_tokens) if self._has(tokens))

    def _has(self, tokens: int) -> bool:
        try:
            found = self.stages(0, tokens)
        except UsageError:
            return False
        counts = [self.image_tokens, *(stage.left(self.image_tokens) for stage in found), 0]
        return all(more > less for more, less in zip(counts, counts[1:], strict=False)) and found[-1].layer < self.layers
