"""From what the user typed to a local folder with a checkpoint: the demo, a folder, or a model on the hub."""

import difflib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import CompError, RefusedError, UsageError
from ..files.outputs import check_room
from ..files.store import read_json
from ..options import BUILT_IN
from ..progress import Progress
from .download_check import check_downloads
from .folder_check import shown
from .weight_files import check_checkpoint, pick_graphs, pick_weights

PACKAGE = Path(__file__).parent.parent
DEMOS = {name: PACKAGE / name.replace("-", "_") for name in BUILT_IN}

KNOWN_IDS = (
    "Salesforce/blip-itm-base-coco",
    "Salesforce/blip-itm-base-flickr",
    "Salesforce/blip-itm-large-coco",
    "Salesforce/blip-itm-large-flickr",
    "Salesforce/blip-vqa-base",
    "Salesforce/blip-image-captioning-base",
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "google/siglip-base-patch16-224",
)
ALIASES = {
    "Salesforce/blip-itm-base": "Salesforce/blip-itm-base-coco",
    "Salesforce/blip-itm-large": "Salesforce/blip-itm-large-coco",
    "blip-itm-base": "Salesforce/blip-itm-base-coco",
    "blip-itm-large": "Salesforce/blip-itm-large-coco",
} | {known.split("/")[1]: known for known in KNOWN_IDS}

# Beside the weights: configs and indices, tokenizers, templates, own code (run only with --trust-remote-code), licence.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md")
# What the client raises where an answer is JSON, but not that of the hub.
NOT_THE_HUB = (ValueError, TypeError, KeyError, AttributeError, AssertionError, IndexError, RuntimeError)
LARGE = (".safetensors", ".bin", ".onnx")  # what holds the numbers of a model
NESTED = "*/*"  # fnmatch's * crosses slashes: ONNX, OpenVINO and checkpoint folders inside a repository stay there

Pick = Callable[..., list[str]]  # names of a repository's files, owner= its id -> those that hold the numbers of its model
NEAR = 2  # folders up from an output to what it shares with a dense model's folder


class NotThere(CompError):
    """The hub does not answer, and the cache has no such repository."""


class NotFound(RefusedError, NotThere):
    """The hub has no such repository, or not for this user."""


@dataclass(frozen=True)
class Source:
    """A checkpoint folder, what to call it in reports (hub id, folder, built-in model), and a hub model's commit."""

    folder: Path
    name: str
    revision: str | None
    kind: Literal["demo", "folder", "hub"]

    @property
    def address(self) -> str:
        """What to type to get the same model again, from any folder."""
        return {"demo": self.name, "folder": str(self.folder.absolute()), "hub": f"hf://{self.name}@{self.revision}"}[self.kind]

    def address_from(self, output: Path) -> str | None:
        """The same for what is written into `output`, and may go to other machines: of a folder the way to it from there, and
        None where it is far away."""
        if self.kind != "folder":
            return self.address
        try:
            way = Path(os.path.relpath(self.folder.resolve(), output.resolve()))
        except ValueError:  # on another drive
            return None
        return way.as_posix() if way.parts.count("..") <= NEAR else None


def resolve(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    allow_pickle: bool = False,
    accepts: Callable[[dict[str, Any]], object] = lambda config: None,
    progress: Progress,
) -> Source:
    """Find a built-in model, a folder, `org/name`, `hf://org/name[@revision]` or a hub page's address; download what is needed.

    `accepts` gets config.json before weights are downloaded, and raises what speaks against it.

    An existing folder wins over a hub id. Raises UsageError for a name that can be neither, RefusedError for a checkpoint that
    is refused (not found, gated, no such revision, broken, or pickled without `allow_pickle`), CompError where the hub cannot
    be reached."""
    pick = partial(pick_weights, allow_pickle=allow_pickle)
    source = locate(model, revision=revision, cache_dir=cache_dir, pick=pick, accepts=accepts, progress=progress)
    check_checkpoint(source.folder, allow_pickle=allow_pickle)
    return source


def resolve_graphs(model: str, *, revision: str | None, cache_dir: Path | None, progress: Progress) -> Source:
    """The same for what `comp export` wrote; the graphs are looked at where they are opened."""
    return locate(model, revision=revision, cache_dir=cache_dir, pick=pick_graphs, progress=progress)


def locate(
    model: str,
    *,
    revision: str | None,
    cache_dir: Path | None,
    pick: Pick,
    accepts: Callable[[dict[str, Any]], object] = lambda config: None,
    progress: Progress,
) -> Source:
    """Where what was typed lies, downloaded where it is on the hub, and not yet looked at; see `resolve`."""
    if "\0" in model:
        said = f"MODEL is {shown(model)}: no name holds a NUL."
        raise UsageError(said, hint="MODEL is demo, demo-vlm, a folder, or a hub id.")
    typed = os.path.expanduser(model)
    demo = DEMOS.get(model)
    local = demo is not None or os.path.isdir(typed)
    if local and revision is not None:
        raise UsageError(f"--revision {revision} needs a hub model; {model} is a folder.")
    if demo is not None:
        if not demo.is_dir():
            raise CompError(f"The {model} model is missing: no folder {demo}.", hint="Install comp again, from its wheel.")
        return Source(demo, model, None, "demo")
    if local:
        folder = Path(typed).resolve()
        return Source(folder, folder.name, None, "folder")
    name, revision = _read_hub_name(model, revision)
    fetch = partial(download, revision=revision, cache_dir=cache_dir, pick=pick, accepts=accepts, progress=progress)
    name, folder = download_known(name, fetch, progress)
    return Source(folder, name, folder.name, "hub")


def on_hub(model: str) -> bool:
    """Whether what was typed is looked for on the hub: no built-in model, and no folder that is here."""
    return model not in DEMOS and not os.path.isdir(os.path.expanduser(model))


def download_known(name: str, fetch: Callable[[str], Path], progress: Progress) -> tuple[str, Path]:
    """The id and snapshot folder of what was typed: a repository of exactly that id, else what people mean by it. fetch: gets
    the snapshot folder of an id; see `download`."""
    real = ALIASES.get(name)
    if real is None:
        return name, fetch(name)
    try:
        return name, fetch(name)
    except NotThere:  # on the hub; where that is off limits or does not answer, in the cache
        pass
    progress.say(f"{name}: taking {real}, its id on the hub.")
    return real, fetch(real)


def download(
    model: str,
    *,
    revision: str | None,
    cache_dir: Path | None,
    pick: Pick,
    accepts: Callable[[dict[str, Any]], object] = lambda config: None,
    progress: Progress,
) -> Path:
    """The snapshot folder of a hub model in the cache, named by its commit, with the files that comp needs.

    Small files come first; with them huggingface_hub caches the list of all files, which says what the weights are.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import disable_progress_bars

    if not progress.shows_bars:
        disable_progress_bars()
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    blobs = cache / f"models--{model.replace('/', '--')}" / "blobs"
    known = set(os.listdir(blobs)) if os.path.isdir(blobs) else set()
    try:
        folder = _snapshot(model, revision, cache_dir, list(SMALL_FILES))
        sizes, announced = _listing(model, folder, cache_dir)
        names = list(sizes)
        if not names:  # another program filled this cache: all there is lies here
            names = os.listdir(folder)
            if not any(name.endswith(LARGE) for name in names):
                raise errors.LocalEntryNotFoundError("no weights in the cache")
        weights = pick(names, owner=model)
        small = [name for name in os.listdir(folder) if name not in weights]
        check_downloads(folder, small, announced, known, model)
        accepts(read_json(folder / "config.json"))
        room = sum(sizes.get(name, 0) for name in weights if not (folder / name).exists())
        check_room(folder, room, f"downloading {model} (--cache-dir names another folder)")
        _snapshot(model, folder.name, cache_dir, weights)
        check_downloads(folder, weights, announced, known, model)
    except (errors.HTTPError, errors.XetDownloadError, OSError, *NOT_THE_HUB) as error:
        raise explain(error, model, revision) from error
    return folder


def _snapshot(model: str, revision: str | None, cache_dir: Path | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=NESTED)
    )


def _listing(model: str, folder: Path, cache_dir: Path | None) -> tuple[dict[str, int], dict[str, tuple[str, int]]]:
    """Bytes of a repository's files by name, empty where they are not known; and SHA-256 and bytes of the large ones."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        files = get_cached_repo_tree(model, cache_dir=cache_dir, revision=folder.name)
    except errors.CachedRepoTreeNotFoundError:
        return {}, {}
    sizes = {file.path: file.size if isinstance(file.size, int) else 0 for file in files}  # a hub may say anything
    return sizes, {file.path: (file.lfs.sha256, file.lfs.size) for file in files if file.lfs}


def suggest(model: str) -> list[str]:
    """Up to three known ids that read like `model`, the nearest first."""
    spellings = {known: known for known in KNOWN_IDS} | ALIASES
    near = difflib.get_close_matches(model, spellings, n=6, cutoff=0.6)
    return list(dict.fromkeys(spellings[name] for name in near))[:3]


def explain(error: BaseException, model: str, revision: str | None) -> CompError:
    """What huggingface_hub raised, as a sentence: RefusedError, UsageError for what is no name, CompError for the rest."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the cache was the second try; the first one says why
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{model}"
            message = f"{model} is gated: its owner has not let you in, or there is no token."
            return RefusedError(message, hint=f"Ask for access at {page}, then set HF_TOKEN.")
        case errors.RepositoryNotFoundError():
            near = suggest(model)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            message = f"{model} is no folder here, and was not found on the Hub, or you have no access."
            return NotFound(message, hint=hint + "For a private model set HF_TOKEN.")
        case errors.RevisionNotFoundError():
            hint = f"See the branches, tags and commits at {constants.ENDPOINT}/{model}/tree/main."
            return RefusedError(f"{model} has no revision {revision}.", hint=hint)
        case errors.HFValidationError():
            hint = "MODEL is demo, a folder, or a hub id such as Salesforce/blip-itm-base-coco."
            return UsageError(f"{model} is neither a folder here nor a hub id.", hint=hint)
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            message = f"The hub refuses {model} (status {response.status_code})."
            return RefusedError(message, hint="Check that HF_TOKEN is valid and may read this model.")
        case errors.HfHubHTTPError(response=response):
            message = f"The hub failed on {model} (status {response.status_code})."
            return CompError(message, hint="Try again later, or give a local folder.")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            message = f"{model} is not in the cache, or not all of it, and the hub is off limits (HF_HUB_OFFLINE)."
            return NotThere(message, hint="Run once without HF_HUB_OFFLINE, or give a local folder.")
        case errors.HTTPError() | errors.XetDownloadError():
            message = f"Cannot reach the hub for {model} at {constants.ENDPOINT} ({type(error).__name__}: {error})."
            return NotThere(message, hint="Check network, proxy and HF_ENDPOINT, or give a local folder.")
        case _ if isinstance(error, NOT_THE_HUB):
            said = f"{type(error).__name__}: {error}"
            message = f"Unexpected response for {model} from {constants.ENDPOINT}: not a Hugging Face Hub endpoint ({said})."
            hint = "Check HF_ENDPOINT, and whether a login page is in the way."
            agents = getattr(constants, "AGENT_HARNESSES_PATH", "")
            if isinstance(error, AttributeError) and os.path.exists(agents):  # an old answer that the client keeps
                hint += f" If it stays so, remove {agents}."
            return CompError(message, hint=hint)
        case OSError(errno=errno.ENOSPC):
            message = f"Cannot store {model}: the disk of the cache is full."
            return CompError(message, hint="Free some space, or name another disk with --cache-dir.")
    return CompError(f"Cannot fetch {model}: {error}")


def only_a_path(model: str) -> bool:
    """Whether what was typed can be no name on the hub."""
    if model.startswith(("hf://", "https://", "http://")):
        return False
    return not model.strip() or model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def names_revision(model: str) -> bool:
    """Whether the address of a model on the hub says which branch, tag or commit."""
    return _read_hub_name(model, None)[1] is not None


def _read_hub_name(model: str, revision: str | None) -> tuple[str, str | None]:
    """Hub id and revision of what was typed. Raises UsageError where it can only be a path, or is no model's address."""
    if model.startswith(("hf://", "https://", "http://")):
        return _read_uri(model, revision)
    if only_a_path(model):
        found = "is a file, not a folder" if os.path.isfile(os.path.expanduser(model)) else "does not exist"
        hint = "MODEL is demo, a folder with a checkpoint, or a hub id such as Salesforce/blip-itm-base-coco."
        raise UsageError(f"The folder {model!r} {found}.", hint=hint)
    return model, revision


def _read_uri(uri: str, revision: str | None) -> tuple[str, str | None]:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError, HFValidationError

    hint = "Write hf://org/name or hf://org/name@revision."
    try:
        parsed = parse_hf_uri(uri)
    except (HfUriError, HFValidationError) as error:
        reason = getattr(error, "msg", error)
        raise UsageError(f"{uri} is not the address of a model: {reason}", hint=hint) from error
    if parsed.type != "model" or parsed.path_in_repo:
        raise UsageError(f"{uri} is not the address of a model.", hint=hint)
    if parsed.revision and revision:
        raise UsageError(f"{uri} names a revision already: leave out --revision {revision}.")
    return parsed.id, parsed.revision or revision
