"""The command line: options, streams, signals, output."""


def run() -> None:
    """The console script."""
    from .main import run

    run()
