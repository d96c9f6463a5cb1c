"""Methods: what `comp prune --method` scores and removes, and how. Names only; light to import.

What there is to remove, the modes, follows from the description of a model (Family.modes).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How scores become a plan.

    params: the rule behind parameter scores (see scoring.PARAMETER_RULES). tokens: the one behind token scores of images (see
    modeling_comp.TOKEN_RULES), None for the family's own. phases: kinds of modes in their order, which share the logarithm
    of the FLOPs left equally and raise the thresholds of their modes together; None where modes are chosen, in
    stages, one mode each (CoMP, engine/stages.py), or with `compares_plans` by whole plans of the ratio (engine/allocation.py).
    """

    description: str
    params: str = "cip"
    tokens: str | None = None
    phases: tuple[str, ...] | None = None
    compares_plans: bool = False

    def removes(self, kind: str) -> bool:
        """Whether "parameters" or "tokens" go."""
        return self.phases is None or kind in self.phases


METHODS = {
    "comp": Method(
        "tokens and parameters together: optimal brain surgeon with refit, whole plans compared", "obs", compares_plans=True
    ),
    "comp-paper": Method("CoMP as published: collaborative importance, one mode per stage by measured cost"),
    "joint": Method("collaborative importance, tokens then parameters", phases=("tokens", "parameters")),
    "sjp": Method("simple joint pruning, tokens first, parameters by wanda", "wanda", phases=("tokens", "parameters")),
    "sjp-obs": Method("simple joint pruning, parameters by optimal brain surgeon", "obs", phases=("tokens", "parameters")),
    "sjp-reversed": Method("simple joint pruning, parameters first", "wanda", phases=("parameters", "tokens")),
    "obs": Method("parameters by optimal brain surgeon with refit", "obs", phases=("parameters",)),
    "wanda": Method("parameters by weight magnitude times activation norm", "wanda", phases=("parameters",)),
    "magnitude": Method("parameters by weight magnitude", "magnitude", phases=("parameters",)),
    "taylor": Method("parameters by first-order Taylor expansion of the loss", "taylor", phases=("parameters",)),
    "upop": Method("parameters by mask gradients, standardised over all layers", "upop", phases=("parameters",)),
    "random": Method("random parameters", "random", phases=("parameters",)),
    "token": Method("tokens by attention received", tokens="attention", phases=("tokens",)),
    "cls": Method("tokens by attention from [CLS]", tokens="cls", phases=("tokens",)),
    "stride": Method("tokens by uniform stride (image-agnostic)", tokens="stride", phases=("tokens",)),
    "random-token": Method("random tokens", tokens="random", phases=("tokens",)),
}
