"""What a plan saves of the FLOPs: at the reference input, and at texts as long as the user's.

Kept numbers of tokens are constants of a plan, and texts share the FLOPs with an image that is always of one size. So the ratio
at other texts is another one.
"""

from ..engine import flops
from ..options import WHOLE
from ..plan import Plan
from ..progress import Progress
from ..report.base import Sizes, Texts
from ..report.prune import AtOwnTexts
from ..report.prune_tables import in_words
from .dense import Dense
from .described import Described

TOLERANCE = 0.01  # that the ratio may lie under the wanted one before it is said


def saved(dense: Dense | Described, plan: Plan, reference: flops.Reference) -> tuple[Sizes, float]:
    """FLOPs of one sample, dense and compact, and the ratio: the share of them that goes."""
    before, after = (flops.count(each, reference).total for each in (dense.plan, plan))
    return Sizes(before, after), round(1 - after / before, 5)


def at_own_texts(dense: Dense, plan: Plan, purpose: str, texts: Texts) -> AtOwnTexts | None:
    """The same at the mean length of texts that were read for a purpose; None where they are as long as the reference's, as
    are those that are padded to one length, or where there are none."""
    reference = dense.reference.with_texts({stream: round(mean) for stream, mean in (texts.tokens or {}).items()})
    if reference.tokens == dense.reference.tokens:
        return None
    sizes, ratio = saved(dense, plan, reference)
    return AtOwnTexts(purpose, reference.tokens, ratio, sizes)


def warn_less(dense: Dense, found: AtOwnTexts, wanted: float, progress: Progress) -> None:
    """A warning where the user's texts get less than the wanted ratio."""
    if wanted - found.ratio <= TOLERANCE:
        return
    length = max(dense.family.topology.text_tokens(found.tokens), WHOLE["text_tokens"][0])
    advice = "Raise --ratio"
    if length != dense.text_tokens:
        advice += f", or count at such texts: --text-tokens {length} (calibration cuts those that are longer)"
    at = f"{in_words(found.tokens, but=dense.reference.tokens)}, the mean of the {found.purpose} pairs"
    progress.warn(f"at {at}, the FLOPs ratio is {found.ratio:.3f}, not {wanted:.3f}. {advice}.")
