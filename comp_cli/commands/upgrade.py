"""`comp upgrade`: today's runtime beside the weights of a compact folder that an older comp wrote."""

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__, signals
from ..checkpoint import hub
from ..checkpoint.folder_check import check_report
from ..checkpoint.loading import load_model
from ..checkpoint.runtimes import FILES, runtime_facts, runtime_files
from ..errors import CompError, RefusedError, UsageError, is_full
from ..families import find_family
from ..files.outputs import reserve, resolve, sibling, swap
from ..files.ownership import discard, seen
from ..files.store import facts, read_config, read_json, write_failed
from ..models.compact import auto_map
from ..progress import Progress
from ..report.upgrade import UpgradeReport

REPORT, CONFIG = "comp_report.json", "config.json"


def upgrade(folder: str | Path, progress: Progress) -> UpgradeReport:
    """Replace the runtime, and refresh what names it: auto_map and versions in config.json, hashes in comp_report.json. All
    other files stay as they are. The report says what changed; nothing where all is as comp writes it today.

    The folder changes as a whole or not at all, after what is new in it has loaded. Raises RefusedError for a folder that is no
    compact model of comp, or whose files are not those that its report names; UsageError where there is none, or one stands in
    it."""
    named = str(folder)
    if named.startswith("hf://"):
        raise _on_the_hub(named)
    folder = resolve(Path(folder), "FOLDER")
    with reserve(folder, source=None):
        if hub.on_hub(named) and not hub.only_a_path(named):  # now that what a killed run had moved is back
            raise _on_the_hub(named)
        changed = _upgrade(folder, progress)
    return UpgradeReport(folder=folder, comp_version=__version__, changed=changed)


def _on_the_hub(named: str) -> UsageError:
    """Files change where they lie."""
    name = named.removeprefix("hf://").partition("@")[0]
    steps = f"hf download {name} --local-dir {name.rsplit('/', 1)[-1]}, comp upgrade on that folder, and hf upload"
    said = f"{named}: no such folder here, and comp upgrade changes files where they lie."
    return UsageError(said, hint=f"Of a model on the hub: {steps}.")


def _upgrade(folder: Path, progress: Progress) -> dict[str, str]:
    """The work, with the folder reserved."""
    config, report = check(folder)
    family, architecture, _ = find_family(config)
    block = config["comp"] | {"runtime": runtime_facts(family)}
    # Auto classes that the user added stay.
    fresh = config | {"comp": block, "auto_map": config.get("auto_map", {}) | auto_map(family, architecture)}
    changed = {}
    was = config["comp"].get("runtime", config["comp"]).get("comp_version")
    files = runtime_files(family)
    for name, today in files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != today.read_bytes():
            changed[name] = f"that of comp {was} is now that of comp {__version__}"
    if added := sorted(fresh["auto_map"].items() - config.get("auto_map", {}).items()):
        changed["auto_map"] = f"answers for {', '.join(name for name, _ in added)} as well"
    if block["runtime"] != config["comp"].get("runtime"):
        changed["versions"] = f"tested with transformers {' to '.join(block['runtime']['transformers'])}"
    if changed:
        check_left(folder)
        replace(folder, fresh, report, files)
    if dense_shapes(config):
        progress.warn(
            f"{folder} drops tokens and has the shapes of the dense model: stock classes load it, and answer as the dense "
            "model, without a word. Prune again to get a folder that they refuse."
        )
    return changed


def check(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and comp_report.json of a compact folder that comp wrote. Raises RefusedError for any other."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder.", hint="Give a folder that comp prune wrote.")
    config = read_config(folder)
    block = config.get("comp")
    whole = isinstance(block, dict) and isinstance(block.get("towers"), list) and isinstance(block.get("runtime", {}), dict)
    has_runtime = any((folder / names[0]).is_file() for names in FILES.values())
    if not whole or not isinstance(config.get("auto_map", {}), dict) or not has_runtime:
        raise RefusedError(
            f"{folder} is not a compact model that comp wrote: expected a block comp in {CONFIG}, and the runtime beside it.",
            hint="Graphs are written anew with comp export; dense models need no runtime.",
        )
    if not (folder / REPORT).is_file():
        raise RefusedError(
            f"{folder}: no {REPORT}; comp did not write this folder, or it was trained further and saved since.",
            hint='comp_cli.load(FOLDER).save_pretrained("NEW") writes such a model anew, with today\'s runtime.',
        )
    check_report(folder)
    return config, read_json(folder / REPORT)


def check_left(folder: Path) -> None:
    """Raises UsageError where the current folder is this one or lies in it: whoever typed the command would stand in a deleted
    folder."""
    if folder in (Path.cwd(), *Path.cwd().parents):
        hint = f"From outside: cd {shlex.quote(str(folder.parent))} && comp upgrade {shlex.quote(folder.name)}"
        raise UsageError(f"{folder} is replaced as a whole, and the current folder lies in it.", hint=hint)


def dense_shapes(config: dict[str, Any]) -> bool:
    """Whether a tower drops tokens and has the heads and channels of the dense model, which its config names."""
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    dense = [{(part.get("num_attention_heads"), part.get("intermediate_size"))} for part in parts]
    for tower in config["comp"]["towers"]:
        sizes = {(layer["attention"]["num_heads"], layer["ffn"]) for layer in tower["layers"]}
        if sizes in dense and any(layer["keep"] for layer in tower["layers"]):
            return True
    return False


def replace(folder: Path, config: dict[str, Any], report: dict[str, Any], runtime: Mapping[str, Path]) -> None:
    """Put a folder with the new files in the place of the old one, once it has loaded. Whatever else lies there comes along.
    runtime: name -> file of today."""
    judged = seen(folder)
    fresh = sibling(folder, "partial")
    try:
        shutil.copytree(folder, fresh, symlinks=True, copy_function=second_name)
        new = {name: path.read_text(encoding="utf-8") for name, path in runtime.items()}
        new[CONFIG] = json.dumps(config, indent=2) + "\n"
        for name, text in new.items():
            write(fresh / name, text)
        files = report["files"] | {name: facts(fresh / name) for name in new}
        write(fresh / REPORT, json.dumps(report | {"files": files}) + "\n")
        load_model(fresh)
        with signals.held():
            if (old := swap(fresh, folder, judged)) is not None:
                discard(old, folder)
                shutil.rmtree(old, ignore_errors=True)  # the user's own folders in it, which came along
    except OSError as error:
        if is_full(error):
            raise write_failed(folder, error) from error
        raise CompError(f"{folder} cannot be replaced: {error.strerror or error}. It is as it was.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write(path: Path, text: str) -> None:
    """A file of its own in the place of one that may share its bytes with the old folder; synced, of the same mode."""
    mode = (path if path.exists() else path.parent / CONFIG).stat().st_mode
    path.unlink(missing_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode & 0o777)


def second_name(path: str, target: str) -> None:
    """A file that stays as it is: a second name of the same bytes where the disk can do that, else a copy."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
