"""What a long run has reached, on disk beside its output, so that the same command goes on after a kill."""

import glob
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CompError, UsageError
from ..files.store import save_tensors, sha256, write_failed


class Journal:
    """One JSON file, `.NAME.journal` beside the output folder, replaced whole after every step, with its own SHA-256.

    Weights that are being trained lie in a file of their own, which the JSON file names with its hash. Whoever has the output's
    lock has the journal (see outputs.reserve).
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        """`output`: its real path (see outputs.resolve)."""
        self.path = output.parent / f".{output.name}.journal"
        self.settings = settings
        self._state: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, None where there is none. Raises UsageError where it was made with other settings."""
        found = self._read()
        if found is None:
            return None
        names = found["settings"].keys() | self.settings.keys()
        self._refuse_changed({name: (found["settings"].get(name), self.settings.get(name)) for name in names})
        self._state = found["state"]
        return self._state

    def compare(self, settings: dict[str, Any]) -> None:
        """Raises UsageError where it was made with other values of these settings, which are some of them: what is known early.
        Dicts are compared in the names that are given."""
        found = self._read()
        if found is None:
            return
        pairs: dict[str, tuple[Any, Any]] = {}
        for name, value in settings.items():
            was = found["settings"].get(name)
            inside = isinstance(value, dict) and isinstance(was, dict)
            pairs |= {f"{name}.{k}": (was.get(k), v) for k, v in value.items()} if inside else {name: (was, value)}
        self._refuse_changed(pairs)

    def finished(self) -> str | None:
        """The SHA-256 of the report that was about to take its place with the output, if the run came so far."""
        found = self._read()
        return None if found is None else found["finished"]

    def peek(self) -> dict[str, Any] | None:
        """The state that was saved last, whatever its settings; None where there is none."""
        found = self._read()
        return None if found is None else found["state"]

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Replace the file; a kill leaves the old one or the new one, each with its own weights. Raises CompError on a full
        disk."""
        old = self._tensor_files()
        if tensors is not None:
            weights = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.safetensors")
            try:
                save_tensors(tensors, weights)
            except BaseException:
                weights.unlink(missing_ok=True)
                raise
            state = state | {"tensors": weights.name, "tensors_sha256": sha256(weights)}
        self._state = state
        self._write(finished=None)
        for path in old:
            path.unlink(missing_ok=True)

    def finish(self, report: Path) -> None:
        """Note which report the output will have: a run that is killed once it is in place has nothing more to do."""
        self._write(finished=sha256(report))

    def tensors(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The weights that were saved with a state. Raises UsageError where they are gone or torn."""
        try:
            path = self.path.with_name(state["tensors"])
            if sha256(path) != state["tensors_sha256"]:
                raise self._refusal("has lost its weights (the file was changed)")
            return load_file(path)
        except (OSError, KeyError, SafetensorError) as error:
            raise self._refusal(f"has lost its weights ({type(error).__name__})") from None

    def remove(self) -> None:
        """Its weights first, for nothing else names them. Raises UsageError where something else than a file has its name."""
        try:
            for path in [*self.path.parent.glob(f"{glob.escape(self.path.name)}.*"), self.path]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._refusal(f"cannot be removed ({error.strerror})", "Move it away") from None

    def _read(self) -> dict[str, Any] | None:
        """Settings, state and what finished; None where there is no journal. Raises UsageError where it is not as it was
        written."""
        if not os.path.lexists(self.path):
            return None
        if self.path.is_symlink() or not self.path.is_file():
            raise self._refusal("is no file", "Move it away")
        try:
            found = json.loads(self.path.read_text())
            told = found.pop("sha256", None)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise self._refusal(f"cannot be read ({type(error).__name__})") from None
        if told != _digest(found):
            raise self._refusal("is not as comp wrote it")
        return found

    def _write(self, finished: str | None) -> None:
        content = json.loads(json.dumps({"settings": self.settings, "state": self._state, "finished": finished}))
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            with new.open("w") as file:
                json.dump(content | {"sha256": _digest(content)}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
        except BaseException as error:
            new.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise write_failed(self.path, error) from error
            raise

    def _refuse_changed(self, pairs: dict[str, tuple[Any, Any]]) -> None:
        """`pairs`: what each setting was and is."""
        written_by, this = pairs.get("comp", (None, None))
        if written_by != this:
            raise self._refusal(f"was written by comp {written_by}; this is {this}, which may calculate other numbers")
        if said := ", ".join(f"{name} was {was} and is {now}" for name, (was, now) in sorted(pairs.items()) if was != now):
            raise self._refusal(f"was made with other settings: {said}")

    def _tensor_files(self) -> list[Path]:
        return list(self.path.parent.glob(f"{glob.escape(self.path.name)}.*.safetensors"))

    def _refusal(self, why: str, do: str = "Start anew with --no-resume") -> CompError:
        hint = f"{do}, or change the output."
        return UsageError(f"the journal {self.path} {why}.", hint=hint)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
