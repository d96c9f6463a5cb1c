"""comp: make vision-language models smaller and faster, and produce deployable checkpoints and ONNX graphs.

>>> import comp_cli
>>> report = comp_cli.prune("Salesforce/blip-itm-base-coco", ratio=0.5, data="pairs.jsonl", output="blip-compact")
>>> comp_cli.export("blip-compact", output="blip-onnx")
>>> model = comp_cli.load("blip-compact")
"""

from . import privacy

privacy.be_silent()  # before anything is imported that would report

__version__ = "0.6.0"

TYPE_CHECKING = False  # as in typing, which is not imported: no more than is there already, see __main__
if TYPE_CHECKING:
    from .api import analyze, bench, compare, export, load, load_onnx, prune
    from .errors import CompError, DeviceError, GateError, RefusedError, UsageError
    from .plan import Plan
    from .progress import Bar, Progress
    from .report.analyze import AnalyzeReport
    from .report.bench import BenchReport
    from .report.compare import CompareReport
    from .report.export import ExportReport
    from .report.prune import PruneReport
    from .report.sweep import SweepReport

__all__ = [
    "AnalyzeReport",
    "Bar",
    "BenchReport",
    "CompError",
    "CompareReport",
    "DeviceError",
    "ExportReport",
    "GateError",
    "Plan",
    "Progress",
    "PruneReport",
    "RefusedError",
    "SweepReport",
    "UsageError",
    "analyze",
    "bench",
    "compare",
    "export",
    "load",
    "load_onnx",
    "prune",
]

_PLACES = {
    "api": ("analyze", "bench", "compare", "export", "load", "load_onnx", "prune"),
    "errors": ("CompError", "DeviceError", "GateError", "RefusedError", "UsageError"),
    "plan": ("Plan",),
    "progress": ("Bar", "Progress"),
    "report.analyze": ("AnalyzeReport",),
    "report.bench": ("BenchReport",),
    "report.compare": ("CompareReport",),
    "report.export": ("ExportReport",),
    "report.prune": ("PruneReport",),
    "report.sweep": ("SweepReport",),
}


def __getattr__(name: str) -> object:
    # What is asked for, imported now (PEP 562). A comment, so that it is no entry of the reference.
    from importlib import import_module

    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{place}", __name__), name)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
