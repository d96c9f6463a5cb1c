"""Where a process begins: signals and streams first, so that also an early end is an orderly one."""

import os

from .. import signals
from . import streams


def run() -> None:
    """The console script."""
    signals.install()
    # Threads that wait for one another sleep. Spinning, two of them on two busy cores are many times slower than one alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # Python started from here takes no code from the current folder
    try:
        has_stdout = streams.settle()
        from .app import run_command
    except signals.Interrupted as end:
        from .app import end_early

        end_early(end)
    else:
        run_command(has_stdout)
