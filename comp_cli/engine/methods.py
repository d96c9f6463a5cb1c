"""Methods: what `comp prune --method` scores and removes, and how. Names only; light to import.

What there is to remove, the modes, follows from the description of a model (Family.modes).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How scores become a plan.

    params: the rule behind parameter scores (see scoring.PARAMETER_RULES). tokens: the one behind token scores of images (see
    modeling_comp.TOKEN_RULES), None for the family's own. phases: kinds of modes in their order, which share the logarithm
    of the FLOPs left equally and raise the thresholds of their modes together; None for CoMP, which chooses a mode in every
    stage.
    """

    description: str
    params: str = "cip"
    tokens: str | None = None
    phases: tuple[str, ...] | None = None

    def removes(self, kind: str) -> bool:
        """Whether "parameters" or "tokens" go."""
        return self.phases is None or kind in self.phases


METHODS = {
    "comp": Method("CoMP: collaborative scores, one mode per stage, chosen by measured cost"),
    "joint": Method("collaborative scores, tokens then parameters", phases=("tokens", "parameters")),
    "sjp": Method("simple joint pruning: tokens, then parameters by wanda", "wanda", phases=("tokens", "parameters")),
    "sjp-reversed": Method("the same, parameters first", "wanda", phases=("parameters", "tokens")),
    "wanda": Method("parameters: weights times activation norms", "wanda", phases=("parameters",)),
    "magnitude": Method("parameters: weights", "magnitude", phases=("parameters",)),
    "taylor": Method("parameters: loss that a unit's removal adds, to first order", "taylor", phases=("parameters",)),
    "upop": Method("parameters: signed gradients of the masks, standardised over all layers", "upop", phases=("parameters",)),
    "random": Method("parameters: chance", "random", phases=("parameters",)),
    "token": Method("tokens: attention received", tokens="attention", phases=("tokens",)),
    "cls": Method("tokens: attention from [CLS]", tokens="cls", phases=("tokens",)),
    "stride": Method("tokens: evenly spread, blind to the image", tokens="stride", phases=("tokens",)),
    "random-token": Method("tokens: chance", tokens="random", phases=("tokens",)),
}
