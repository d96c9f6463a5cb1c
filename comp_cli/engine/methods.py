"""Methods: what `comp prune --method` scores and removes, and how. Names only; light to import.

What there is to remove, the modes, follows from the description of a model (Family.modes).
"""

from dataclasses import dataclass

from ..errors import UsageError
from ..families import Family
from .token_schedules import TOKEN_METHODS

BOTH = ENCODER, DECODER = "encoder", "decoder"  # where image tokens leave, see Topology.drops_in
KINDS = {ENCODER: "models that encode images and texts (CLIP, BLIP)", DECODER: "image-text decoders (LLaVA and its kin)"}


@dataclass(frozen=True)
class Method:
    """How scores become a plan.

    params: the rule behind parameter scores (see scoring.PARAMETER_RULES). tokens: the one behind token scores of images (see
    modeling_comp.TOKEN_RULES), None for the family's own. phases: kinds of modes in their order, which share the logarithm
    of the FLOPs left equally and raise the thresholds of their modes together; None where modes are chosen, in
    stages, one mode each (CoMP, engine/stages.py), or with `compares_plans` by whole plans of the ratio (engine/allocation.py).
    drops_in: the kinds of models that it is for. In a decoder a method of tokens is a schedule of rules, which asks for a
    number of tokens and for no data (engine/token_schedules.py).
    """

    description: str
    params: str = "cip"
    tokens: str | None = None
    phases: tuple[str, ...] | None = None
    compares_plans: bool = False
    drops_in: tuple[str, ...] = (ENCODER,)

    @property
    def only_tokens(self) -> bool:
        """Whether parameters stay as they are."""
        return not self.removes("parameters")

    def removes(self, kind: str) -> bool:
        """Whether "parameters" or "tokens" go."""
        return self.phases is None or kind in self.phases


PARAMETERS = ("parameters",)
METHODS = {
    "comp": Method(
        "tokens and parameters together: optimal brain surgeon with refit, whole plans compared",
        "obs",
        compares_plans=True,
        drops_in=BOTH,
    ),
    "comp-paper": Method("CoMP as published: collaborative importance, one mode per stage by measured cost"),
    "joint": Method("collaborative importance, tokens then parameters", phases=("tokens", "parameters")),
    "sjp": Method("simple joint pruning, tokens first, parameters by wanda", "wanda", phases=("tokens", "parameters")),
    "sjp-obs": Method("simple joint pruning, parameters by optimal brain surgeon", "obs", phases=("tokens", "parameters")),
    "sjp-reversed": Method("simple joint pruning, parameters first", "wanda", phases=("parameters", "tokens")),
    "obs": Method("parameters by optimal brain surgeon with refit", "obs", phases=PARAMETERS, drops_in=BOTH),
    "wanda": Method("parameters by weight magnitude times activation norm", "wanda", phases=PARAMETERS, drops_in=BOTH),
    "magnitude": Method("parameters by weight magnitude", "magnitude", phases=PARAMETERS, drops_in=BOTH),
    "taylor": Method("parameters by first-order Taylor expansion of the loss", "taylor", phases=PARAMETERS, drops_in=BOTH),
    "upop": Method("parameters by mask gradients, standardised over all layers", "upop", phases=PARAMETERS, drops_in=BOTH),
    "random": Method("random parameters", "random", phases=PARAMETERS, drops_in=BOTH),
    "token": Method("tokens by attention received", tokens="attention", phases=("tokens",)),
    "cls": Method("tokens by attention from [CLS]", tokens="cls", phases=("tokens",)),
    "stride": Method("tokens by uniform stride (image-agnostic)", tokens="stride", phases=("tokens",), drops_in=BOTH),
    "random-token": Method("random tokens", tokens="random", phases=("tokens",), drops_in=BOTH),
}
# Of models with a decoder those of token_schedules.py; two are for both kinds.
METHODS |= {
    name: Method(description, phases=("tokens",), drops_in=(DECODER,))
    for name, description in TOKEN_METHODS.items()
    if name not in METHODS
}


def methods_for(drops_in: str, *, only_tokens: bool = False) -> list[str]:
    """Names of the methods for a kind of models; all of them, or those that leave parameters alone."""
    fitting = {name: found for name, found in METHODS.items() if drops_in in found.drops_in}
    return [name for name, found in fitting.items() if found.only_tokens or not only_tokens]


def find_method(name: str) -> Method:
    """The method of a name. Raises UsageError where it is none."""
    if name not in METHODS:
        raise UsageError(f"--method {name}: unknown.", hint=f"Use one of {', '.join(METHODS)}.")
    return METHODS[name]


def check_fits(name: str, family: Family, architecture: str, *, by_ratio: bool) -> None:
    """Raises UsageError for a method that is not for the models of a family, with those that are, and for one that is asked
    for in the wrong way: by ratio where image tokens of a decoder go by number, or the other way round."""
    kind, fits = family.topology.drops_in, METHODS[name].drops_in
    if kind not in fits:
        said = f"--method {name} is for {' and '.join(KINDS[one] for one in fits)}, and this model is a {architecture}."
        raise UsageError(said, hint=f"For it: {', '.join(methods_for(kind))}.")
    if by_ratio == (kind == DECODER and METHODS[name].only_tokens):
        wanted = "a number of image tokens: --tokens 64, or --tokens-share 0.11" if by_ratio else "--ratio"
        raise UsageError(f"--method {name} of a {architecture} is asked for {wanted}.")
