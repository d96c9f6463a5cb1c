"""comp: make vision-language models smaller and faster, and hand over something that people can deploy."""

from pathlib import Path

__version__ = "0.1.0"


def load(folder: str | Path, *, dtype: str | None = None, device: str = "cpu"):
    """The model of a checkpoint folder, compact or dense, in eval mode.

    dtype: "fp32", "bf16", "fp16" or None for the checkpoint's own. Raises `comp_cli.errors.CompError` where the folder is
    refused: weights missing, left over, of another size than config.json says, or not finite.
    """
    from . import loading

    return loading.load_model(Path(folder), dtype=loading.pick_dtype(dtype)).to(loading.pick_device(device))
