"""`python -m comp_cli`, which puts the current folder first on the path: what lies there is no library."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # before anything more is imported

from .cli import run  # noqa: E402

run()
