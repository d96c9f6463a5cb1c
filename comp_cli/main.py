"""Where a process begins: signals and streams first, so that also an early end is an orderly one."""

import os
import sys

from . import signals, streams


def run() -> None:
    """The console script."""
    signals.install()
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # Python started from here takes no code from the current folder
    try:
        has_stdout = streams.settle()
        from .cli import run_command
    except signals.Interrupted as end:
        from .cli import end_early

        end_early(end)
    else:
        run_command(has_stdout)


def run_module() -> None:
    """`python -m comp_cli`, which puts the current folder first on the path: what lies there is no library."""
    if not sys.flags.safe_path:
        del sys.path[0]
    run()
