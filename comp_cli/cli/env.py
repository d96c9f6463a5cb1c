"""`comp env`."""

import typer

from .. import api
from ..report.environment import print_environment
from . import shared_options as given
from .perform import perform


def env(
    context: typer.Context,
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
) -> None:
    """Show versions, devices and providers, and what would fail here: for bug reports.

    Examples:

    `comp env`

    `comp env --json`
    """
    perform(context, lambda options, out: api.environment(), print_environment)
