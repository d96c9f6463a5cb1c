"""Where a compact model lies that was named as a folder, as a hub id or address, or not at all. Light to import."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RefusedError, UsageError
from ..files.outputs import resolve as real_path
from ..files.store import find_last, read_config
from ..options import HUB_DEFAULTS, HubOptions
from ..progress import Progress
from . import hub

HINT = "Name a folder that `comp prune` wrote, or a compact model on the hub: org/name or hf://org/name@revision."


def find_compact(model: str | None, progress: Progress, hub_options: HubOptions = HUB_DEFAULTS) -> hub.Source:
    """The folder that was named, one fetched from the hub, or the last compact model below the current folder.

    No code of it is run, here or later: comp has a runtime of its own, and what lies beside the weights is for transformers.
    Raises UsageError where there is none, RefusedError for a model that is dense, and what `hub.resolve` raises."""
    named = str(_last(progress)) if model is None else model
    if hub.only_a_path(named) and hub.on_hub(named):
        raise UsageError(f"{named}: no such folder.", hint=HINT)

    def accepts(config: dict[str, Any]) -> None:
        if "comp" not in config:
            raise RefusedError(f"{named} is not a compact model.", hint=f"Make one with: comp prune {named} --ratio 0.5")

    source = hub.resolve(named, accepts=accepts, progress=progress, **vars(hub_options))
    accepts(read_config(source.folder))
    return source


def _last(progress: Progress) -> Path:
    folder = find_last("comp_report.json", real_path(Path(), "the current folder"))
    if folder is None:
        hint = "Make one with: comp prune demo --ratio 0.5 -o compact"
        raise UsageError("no folder named, and no compact model below the current folder.", hint=hint)
    progress.say(f"taking {folder}")
    return folder


def beside(source: hub.Source, ending: str) -> Path:
    """Where what is made of a model goes if nobody says: beside its folder, or for a model of the hub in the current folder."""
    if source.kind == "hub":
        return Path(source.name.rsplit("/", 1)[-1] + ending)
    return source.folder.with_name(source.folder.name + ending)


def options_of_each(model: str | None, other: str | None, hub_options: HubOptions) -> tuple[HubOptions, HubOptions]:
    """The options of two models that share one --revision: it is that of the one on the hub that names none itself, and where
    neither is, of the second, which may be looked up yet. Raises UsageError where it could be that of both."""
    revision, without = hub_options.revision, replace(hub_options, revision=None)
    if revision is None:
        return hub_options, hub_options
    first, second = (one is not None and hub.on_hub(one) and not hub.names_revision(one) for one in (model, other))
    if first and second:
        said = f"--revision {revision}: {model} and {other} are both on the hub."
        raise UsageError(said, hint=f"Say which is meant: hf://{model}@{revision}, or the same of the other one.")
    return (hub_options, without) if first else (without, hub_options)
