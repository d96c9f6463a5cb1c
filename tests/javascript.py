"""Node, where it is installed with the packages that a test needs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def node_modules(package: str) -> str:
    """The folder of node's packages, where this one is installed: in NODE_PATH, or globally."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    places = os.environ.get("NODE_PATH", "").split(os.pathsep)
    if shutil.which("npm"):
        places.append(subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=False).stdout.strip())
    found = next((place for place in places if place and (Path(place) / package).is_dir()), None)
    hint = f"npm install --ignore-scripts {package}, and NODE_PATH=.../node_modules"
    return found or pytest.skip(f"{package} is not installed: {hint}")


def in_node(folder: Path, code: str, modules: str) -> str:
    """What code prints in a folder."""
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(modules)
    (folder / "run.mjs").write_text(code)
    said = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return said.stdout.strip()
