"""Closed choices as the parser knows them: help lists the values, shells complete them, others are refused. For the functions
of the library, and for a type checker, they are texts."""

from typing import TYPE_CHECKING, Literal

from ..engine.methods import DECODER, ENCODER, methods_for
from ..engine.token_schedules import TOKEN_METHODS
from ..families import FAMILIES
from ..options import ATTENTION, BACKENDS, DTYPES, EFFORTS, LAYOUTS, MIXED_PRECISIONS, QUANTIZATIONS, SALIENCIES, TARGETS
from .streams import MODES

METHODS = tuple(dict.fromkeys([*methods_for(ENCODER), *methods_for(DECODER)]))
TASKS = tuple(dict.fromkeys(task for family in FAMILIES.values() for own in family.architectures.values() for task in own))

if TYPE_CHECKING:
    Dtype = str
    Effort = str
    Format = str
    Layout = str
    Method = str
    Precision = str
    Quantization = str
    Saliency = str
    Target = str
    TaskName = str
    TokensMethod = str
else:
    Dtype = Literal[DTYPES]
    Effort = Literal[tuple(EFFORTS)]
    Format = Literal[MODES]
    Layout = Literal[LAYOUTS]
    Method = Literal[METHODS]
    Precision = Literal[MIXED_PRECISIONS]
    Quantization = Literal[QUANTIZATIONS]
    Saliency = Literal[SALIENCIES]
    Target = Literal[TARGETS]
    TaskName = Literal[TASKS]
    TokensMethod = Literal[(ATTENTION, *TOKEN_METHODS)]


def backends(incomplete: str) -> list[str]:
    """How a list of backends, with commas, can go on. For the completion of shells."""
    *before, last = incomplete.split(",")
    return [",".join([*before, name]) for name in BACKENDS if name.startswith(last) and name not in before]


def devices(incomplete: str) -> list[str]:
    """Devices that begin so; which there are, only torch knows. For the completion of shells."""
    return [name for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]
