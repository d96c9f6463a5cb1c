"""Prints the versions of comp's direct dependencies in the environment that runs it, as constraints for pip."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
lines = [line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group]
names = dict.fromkeys(re.match(r"[\w.-]+", line)[0] for line in lines)

print("# The newest versions on the day of the last `make newest`: what CI's second leg tests with.")
for name in names:
    try:
        found = version(name).split("+")[0]  # without a local part such as +cpu, which is how a wheel was built
    except PackageNotFoundError:  # of an extra that is not tested
        continue
    if name != project["name"]:
        print(f"{name}=={found}")
