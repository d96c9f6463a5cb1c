"""`comp export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api
from ..options import DataOptions, ExportOptions, HubOptions
from ..report.export import ExportReport
from . import choices
from . import shared_options as given
from .output import Output
from .perform import perform
from .shared_options import COMPUTING, MAIN, OUTPUT, option

GRAPHS = "Graphs"


def export(
    context: typer.Context,
    folder: given.Folder = None,
    onnx: Annotated[bool, option(MAIN, "Write ONNX, which is the only format, with or without this.", "--onnx")] = True,
    output: Annotated[Path | None, given.output_dir("FOLDER-onnx")] = None,
    dtype: Annotated[choices.Dtype, option(MAIN, "Of the weights; inputs and outputs stay fp32.")] = ExportOptions.dtype,
    quantize: Annotated[
        choices.Quantization | None,
        option(
            MAIN,
            "int8 (dynamic), or int4 (weights of a large decoder); layers that change predictions stay in float.",
            show_default=False,
        ),
    ] = ExportOptions.quantize,
    layout: Annotated[
        choices.Layout, option(MAIN, "optimum, or transformers.js: CLIP, SigLIP or LLaVA as that client runs them.")
    ] = ExportOptions.layout,
    split: Annotated[
        bool,
        option(MAIN, "vision_model.onnx and text_model.onnx, not model.onnx: an image is encoded once.", "--split"),
    ] = ExportOptions.split,
    with_preprocessing: Annotated[
        bool,
        option(MAIN, "The graph takes a picture as it is, uint8: it resizes, crops and normalises.", "--with-preprocessing"),
    ] = ExportOptions.with_preprocessing,
    data: Annotated[str | None, option(MAIN, f"Image-text pairs to check parity on: {given.PAIRS}")] = DataOptions.data,
    image_column: given.ImageColumn = DataOptions.image_column,
    text_column: given.TextColumn = DataOptions.text_column,
    answer_column: given.AnswerColumn = DataOptions.answer_column,
    split_column: given.SplitColumn = DataOptions.split_column,
    atol: Annotated[
        float | None, option(GRAPHS, "Max. abs. error against PyTorch (default: by precision).", show_default=False)
    ] = ExportOptions.atol,
    optimize: Annotated[
        bool, option(GRAPHS, "ONNX Runtime's fusions, ahead of time; kept if the graphs still agree.", "--optimize")
    ] = ExportOptions.optimize,
    target: Annotated[
        choices.Target, option(GRAPHS, "onnxruntime (fused attention), or onnx (standard operators only).")
    ] = ExportOptions.target,
    opset: Annotated[int, option(GRAPHS, "ONNX opset, 18 to 23; of large decoders 23.")] = ExportOptions.opset,
    device: Annotated[
        str, option(COMPUTING, "Where parity is checked: cpu, cuda or cuda:N.", autocompletion=choices.devices)
    ] = ExportOptions.device,
    threads: given.Threads = ExportOptions.threads,
    revision: given.Revision = HubOptions.revision,
    cache_dir: given.CacheDir = HubOptions.cache_dir,
    overwrite: given.Overwrite = False,
    keep_failed: Annotated[
        bool, option(OUTPUT, "Leave refused graphs in OUTPUT.failed.", "--keep-failed")
    ] = ExportOptions.keep_failed,
    push_to_hub: given.PushToHub = ExportOptions.push_to_hub,
    private: given.Private = ExportOptions.private,
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
    no_progress: given.NoProgress = False,
) -> None:
    """Write an ONNX graph with the token pruning inside, checked against PyTorch.

    Examples:

    `comp export compact`

    `comp export -o served` (takes the last compact model below the current folder)

    `comp export me/blip-compact -o served` (a compact model on the Hub)

    `comp export compact --split --quantize int8 --data pairs.jsonl -o served`
    """

    def call(options: dict[str, Any], out: Output) -> ExportReport:
        del options["onnx"]
        return api.export(**options, progress=out)

    def show(report: Any, out: Output) -> None:
        from ..report.export_tables import print_export

        print_export(report, out)

    perform(context, call, show, lambda report: report.output)
