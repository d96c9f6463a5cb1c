"""What a long run has reached, on disk beside its output, so that the same command goes on after a kill."""

import glob
import json
import os
import secrets
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import USAGE, CompError
from .store import save_tensors


class Journal:
    """One JSON file, `.NAME.journal` beside the output folder, replaced whole after every step.

    Weights that are being trained lie in a file of their own, which the JSON file names.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.path = output.parent / f".{output.name}.journal"
        self.settings = settings

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, None where there is none. Exit 2 where it was made with other settings."""
        try:
            found = json.loads(self.path.read_text())
            settings, state = found["settings"], found["state"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise self._refusal(f"cannot be read ({type(error).__name__})") from None
        names = settings.keys() | self.settings.keys()
        changed = sorted(name for name in names if settings.get(name) != self.settings.get(name))
        if changed:
            said = ", ".join(f"{name} was {settings.get(name)} and is {self.settings.get(name)}" for name in changed)
            raise self._refusal(f"was made with other settings: {said}")
        return state

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Replace the file; a kill leaves the old one or the new one, each with its own weights."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self._tensor_files()
        if tensors is not None:
            weights = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.safetensors")
            save_tensors(tensors, weights)
            state = state | {"tensors": weights.name}
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with new.open("w") as file:
            json.dump({"settings": self.settings, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        for path in old:
            path.unlink(missing_ok=True)

    def tensors(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The weights that were saved with a state. Exit 2 where they are gone or torn."""
        try:
            return load_file(self.path.with_name(state["tensors"]))
        except (OSError, KeyError, SafetensorError) as error:
            raise self._refusal(f"has lost its weights ({type(error).__name__})") from None

    def _tensor_files(self) -> list[Path]:
        return list(self.path.parent.glob(f"{glob.escape(self.path.name)}.*.safetensors"))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        for torn in self.path.parent.glob(f"{glob.escape(self.path.name)}.*"):
            torn.unlink(missing_ok=True)

    def _refusal(self, why: str) -> CompError:
        return CompError(
            f"the journal {self.path} {why}.", code=USAGE, hint="Start anew with --no-resume, or change the output."
        )
