"""`comp compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api
from ..errors import GateError
from ..options import CompareOptions
from ..report.compare import CompareReport
from . import shared_options as given
from .output import Output
from .perform import perform
from .shared_options import GATES, option


def compare(
    context: typer.Context,
    before: Annotated[Path, typer.Argument(help="A file that `comp bench --save` wrote.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="A later one, of the same machine and dense model.", show_default=False)],
    max_regression: Annotated[
        float | None, option(GATES, "Percent that a compact row may be slower, if beyond its intervals.")
    ] = CompareOptions.max_regression,
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
) -> None:
    """Compare two benchmarks: what became slower or faster beyond the noise, and by how much.

    Examples:

    `comp bench compact --save new.json`

    `comp compare last.json new.json`

    `comp compare last.json new.json --max-regression 5` (a gate for CI: exit code 3)
    """

    def show(report: Any, out: Output) -> None:
        from ..report.compare_tables import print_comparison

        print_comparison(report, out)

    def call(options: dict[str, Any], out: Output) -> CompareReport:
        try:
            return api.compare(**options, progress=out)
        except GateError as missed:
            show(missed.report, out)
            raise

    perform(context, call, show)
