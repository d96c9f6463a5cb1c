"""Modes and methods: what `comp prune --method` scores and removes, and how. Names only; light to import."""

from dataclasses import dataclass

# The five modes: what one of them removes. A parameter mode is (tower, parts of its layers), a token mode a tower.
PARAMETER_MODES = {
    "vision_params": ("vision", ("attention", "ffn")),
    "language_params": ("language", ("attention", "ffn")),
    "cross_params": ("language", ("cross",)),
}
TOKEN_MODES = {"vision_tokens": "vision", "language_tokens": "language"}
MODES = (*PARAMETER_MODES, *TOKEN_MODES)


@dataclass(frozen=True)
class Method:
    """params: the rule behind parameter scores (see scoring.PARAMETER_RULES), None where none are removed. token_share: the
    tokens' share of the logarithmic FLOPs reduction in one shot, None for the stages of CoMP."""

    params: str | None
    token_share: float | None
    about: str

    @property
    def modes(self) -> tuple[str, ...]:
        if self.params is None:
            return tuple(TOKEN_MODES)
        return tuple(PARAMETER_MODES) if self.token_share == 0 else (*PARAMETER_MODES, *TOKEN_MODES)


METHODS = {
    "comp": Method("cip", None, "collaborative multi-mode pruning: one mode per stage, chosen by measured cost"),
    "joint": Method("cip", 0.5, "collaborative scores, tokens then parameters in one shot, half of the reduction each"),
    "sjp": Method("wanda", 0.5, "simple joint pruning: the same with scores that know nothing of each other"),
    "wanda": Method("wanda", 0.0, "parameters only: weights times activation norms"),
    "magnitude": Method("magnitude", 0.0, "parameters only: weights"),
    "random": Method("random", 0.0, "parameters only: chance"),
    "token": Method(None, 1.0, "tokens only: attention received"),
}
