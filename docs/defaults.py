"""For mkdocstrings: defaults as values. In the code they are `PruneOptions.seed`, of which a page would show "seed"."""

from typing import Any

import griffe

from comp_cli import options  # light: it needs no library


class Defaults(griffe.Extension):
    """Reads the fields of the options that parameters of `comp_cli.api` have as their defaults."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for function in pkg["api"].functions.values():
            for parameter in function.parameters:
                cls, _, field = str(parameter.default).partition(".")
                if field:
                    parameter.default = repr(getattr(getattr(options, cls), field))
