"""The runtime that lies beside a compact checkpoint: for each shape of models its module and files. Light to import."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__
from ..families import Family

PLACE = Path(__file__).parent.parent / "runtime"
# Module that makes and runs compact models -> what it is made of. A module beside a checkpoint finds the others there.
FILES = {
    "modeling_comp": ("modeling_comp.py",),
    "modeling_comp_vlm": ("modeling_comp_vlm.py", "kept_cache.py", "token_selection.py", "token_rules.py"),
}
ALL = frozenset(name for names in FILES.values() for name in names)


def runtime_of(family: Family) -> Any:
    """The module: `compact_class(architecture)` is the class of compact models, `TESTED` the releases of transformers."""
    return import_module(f"comp_cli.runtime.{family.topology.runtime}")


def runtime_files(family: Family) -> dict[str, Path]:
    """Name beside a checkpoint -> the file that comp has of it today."""
    return {name: PLACE / name for name in FILES[family.topology.runtime]}


def ship(family: Family, folder: Path) -> None:
    """Put the runtime beside a checkpoint."""
    for name, path in runtime_files(family).items():
        shutil.copyfile(path, folder / name)


def runtime_facts(family: Family) -> dict[str, Any]:
    """Of the runtime that is shipped: whose it is, and the releases of transformers that it was tested with."""
    return {"comp_version": __version__, "transformers": list(runtime_of(family).TESTED)}
