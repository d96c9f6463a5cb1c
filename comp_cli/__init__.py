"""comp: make vision-language models smaller and faster, and hand over something that people can deploy."""

from os import PathLike  # no more than is there already: see __main__

from .privacy import be_silent

be_silent()  # before anything is imported that would report

__version__ = "0.1.1"


def load(folder: str | PathLike, *, dtype: str | None = None, device: str = "cpu"):
    """The model of a checkpoint folder, compact or dense, in eval mode.

    dtype: "fp32", "bf16", "fp16" or None for the checkpoint's own. Raises `comp_cli.errors.CompError` where the folder is
    refused: weights missing, left over, of another size than config.json says, or not finite.
    """
    from pathlib import Path

    from .checkpoint import loading

    return loading.load_model(Path(folder), dtype=loading.pick_dtype(dtype)).to(loading.pick_device(device))


def load_onnx(folder: str | PathLike, *, device: str = "cpu"):
    """A captioning or question-answering model whose `generate` runs the ONNX graphs that `comp export` wrote into a folder.

    Takes what the stock `generate` takes: prompts, beams, sampling. Raises `comp_cli.errors.CompError` for graphs that write
    no texts, or a device that ONNX Runtime does not have.
    """
    from pathlib import Path

    from .checkpoint import loading
    from .onnx import generation

    return generation.load_writer(Path(folder), str(loading.pick_device(device)))
