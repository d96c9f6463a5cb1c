"""A folder that comp wrote becomes a repository on the hub: whole, as one commit, or not at all. Light to import."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import signals
from ..errors import CompError, RefusedError, UsageError
from ..progress import Progress
from .hub import NOT_THE_HUB

OF_EVERY_REPOSITORY = {".gitattributes"}  # which the hub writes itself
OPTION = "--push-to-hub"
SHORTER = "Write it as ORG/NAME, of letters, digits, -, _ and dots: me/blip-compact."
LOGIN = "Run `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)."


@dataclass(frozen=True)
class Target:
    """A repository to be written.

    Attributes:
        name: "org/name".
        private: whether it is made for its owners only; one that exists stays as it is.
        overwrite: whether what it holds may be replaced.
    """

    name: str
    private: bool
    overwrite: bool

    def later(self, folder: Path) -> str:
        """The command line that uploads a folder by hand."""
        return f"hf upload {self.name} {shlex.quote(str(folder))} .{' --private' * self.private}"


@dataclass(frozen=True)
class Found:
    """What the hub has of a repository: its last commit and its files; None and none where it does not exist."""

    commit: str | None
    files: frozenset[str] = frozenset()


def check_name(name: str | None, private: bool, dry_run: bool = False) -> None:
    """Raises UsageError for what can be no repository, and for options that say nothing without one. The hub is not asked."""
    if name is None:
        if private:
            raise UsageError(f"--private is of a repository, and there is no {OPTION}.", hint="Add --push-to-hub ORG/NAME.")
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{OPTION} {name!r}: {str(error).rstrip('.')}.", hint=SHORTER) from error
    if name.count("/") != 1:
        raise UsageError(f"{OPTION} {name}: whose repository that is, is not said.", hint=SHORTER)
    if dry_run:
        raise UsageError(f"{OPTION} needs a folder, which --dry-run does not write.")
    if constants.HF_HUB_OFFLINE:
        hint = f"Unset HF_HUB_OFFLINE, or leave {OPTION} out and upload the folder later: hf upload {name} FOLDER ."
        raise UsageError(f"{OPTION} {name}: the hub is off limits (HF_HUB_OFFLINE).", hint=hint)


def look(target: Target) -> Found:
    """Ask the hub whether a repository may be written, before any work is done for it; what it holds now.

    Raises RefusedError where there is no token, or one that may not write there; UsageError where the repository holds
    something, and nobody said that it may go, or is public and should be private; CompError where the hub does not answer."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise RefusedError(f"{OPTION} {target.name}: there is no token of the hub.", hint=LOGIN)
    api = HfApi()
    with sentences(target):
        _check_owner(target, api.whoami())
        try:
            info = api.model_info(target.name)
        except RepositoryNotFoundError:
            return Found(None)
        found = Found(info.sha, frozenset(file.rfilename for file in info.siblings or ()))
    if target.private and info.private is False:
        hint = "Make it private on the hub, choose another name, or leave --private out."
        raise UsageError(f"--private: {target.name} exists, and everybody can read it.", hint=hint)
    if (held := sorted(found.files - OF_EVERY_REPOSITORY)) and not target.overwrite:
        said = f"{OPTION} {target.name}: the repository holds {len(held)} files already, such as {held[0]}."
        raise UsageError(said, hint="Choose another name, or --overwrite: it replaces them in one commit, behind the old ones.")
    return found


def _check_owner(target: Target, who: dict[str, Any]) -> None:
    """Raises RefusedError where what the hub says of a token speaks against writing there; what it does not say, does not."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise RefusedError(f"{OPTION} {target.name}: the token may read only.", hint=LOGIN)
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if isinstance(scopes, list) and not any("repo.write" in (scope.get("permissions") or ()) for scope in scopes):
        raise RefusedError(f"{OPTION} {target.name}: the token may write to no repository.", hint=LOGIN)
    owner, orgs = target.name.split("/")[0].lower(), who.get("orgs")
    if owner == str(who.get("name")).lower() or not isinstance(orgs, list):
        return
    own = {str(org.get("name")).lower(): org.get("roleInOrg") for org in orgs}
    if owner not in own:
        known = ", ".join([str(who.get("name")), *sorted(own)])
        said = f"{OPTION} {target.name}: the token is of {who.get('name')}, who does not write for {target.name.split('/')[0]}."
        raise RefusedError(said, hint=f"It may write for {known}.")
    if own[owner] == "read":
        raise RefusedError(f"{OPTION} {target.name}: {who.get('name')} may only read what is {owner}'s.")


def push(folder: Path, target: Target, message: str, progress: Progress) -> str:
    """Upload all files of a folder as one commit, and return its address. What else the repository held goes with it.

    A repository that was made for it is removed again where that fails, or is ended by a signal: a reader sees all or nothing.
    Raises what `look` raises, and CompError where the hub fails."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not progress.shows_bars:
        disable_progress_bars()
    found, api = look(target), HfApi()  # again: the work took its time
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    size = sum(path.stat().st_size for path in files.values())
    progress.say(f"uploading {len(files)} files ({size / 2**20:,.1f} MiB) to {target.name} ...")
    with sentences(target):
        if found.commit is None:
            api.create_repo(target.name, private=target.private or None)
        try:
            old = sorted(found.files - files.keys() - OF_EVERY_REPOSITORY)
            changes = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            gone = [CommitOperationDelete(name, is_folder=False) for name in old]
            done = api.create_commit(target.name, [*changes, *gone], commit_message=message, parent_commit=found.commit)
        except BaseException as error:
            if found.commit is None:
                with signals.held():
                    _take_back(api, target, error)
            raise
    return str(done.commit_url)


def _take_back(api: Any, target: Target, error: BaseException) -> None:
    """Remove a repository that was made and could not be filled. Raises CompError where that fails as well."""
    try:
        api.delete_repo(target.name, missing_ok=True)
    except Exception as second:
        said = f"{_said(error)} The repository {target.name}, which was made for it, could not be removed ({_said(second)})."
        raise CompError(said, hint=f"Remove it once the hub answers: hf repos delete {target.name}") from error


@contextmanager
def sentences(target: Target) -> Iterator[None]:
    """What huggingface_hub raises of an upload, as a sentence: RefusedError where the hub says no, CompError for the rest."""
    from huggingface_hub import errors

    try:
        yield
    except CompError:
        raise
    except (errors.HTTPError, errors.XetDownloadError, OSError, *NOT_THE_HUB) as error:
        wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None  # that of a large file
        raise _explain(error.__cause__ if wrapped else error, target) from error


def _explain(error: BaseException | None, target: Target) -> CompError:
    from huggingface_hub import constants, errors

    about = f"{OPTION} {target.name}:"
    match error:
        case errors.HfHubHTTPError(response=response):
            status = response.status_code
            if status == 401:
                return RefusedError(f"{about} the hub does not know this token (status 401).", hint=LOGIN)
            if status in (403, 404):
                return RefusedError(f"{about} the hub does not let this token write there (status {status}).", hint=LOGIN)
            if status in (409, 412):
                said = f"{about} somebody else wrote there in the meantime (status {status})."
                return CompError(said, hint="Look at what is there, and upload again.")
            return CompError(f"{about} the hub failed (status {status}): {_said(error)}", hint="Try again later.")
        case errors.HTTPError() | errors.XetDownloadError() | OSError():
            said = f"{about} cannot reach the hub at {constants.ENDPOINT} ({_said(error)})."
            return CompError(said, hint="Check network, proxy and HF_ENDPOINT.")
    said = f"{about} unexpected response from {constants.ENDPOINT} ({_said(error)})."
    return CompError(said, hint="Check HF_ENDPOINT, and whether a login page is in the way.")


def _said(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
