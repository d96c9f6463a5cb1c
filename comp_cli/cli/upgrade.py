"""`comp upgrade`."""

from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..report.upgrade import print_upgraded
from . import shared_options as given
from .perform import perform


def upgrade(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="A folder that `comp prune` wrote.", show_default=False)],
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
) -> None:
    """Put today's runtime beside the weights of a compact folder that an older comp wrote.

    `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` runs the modeling_comp.py of the folder, which may be older than
    the transformers that it meets. The weights stay as they are; the folder changes as a whole or not at all.

    Examples:

    `comp upgrade blip-compact`
    """
    perform(context, lambda options, out: api.upgrade(**options, progress=out), print_upgraded, lambda report: Path(folder))
