"""The head of a model card, which the hub reads: licence, origin, kind of pipeline, and what was measured before and after."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from transformers.models.auto import modeling_auto

from ..options import LAYOUTS

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the metadata of a dense model
TAGS = ("comp", "pruned", "structured-pruning", "token-pruning")
CLASSES = {  # pipelines, with the stock classes that they take, by model_type
    "zero-shot-image-classification": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "visual-question-answering": modeling_auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES,
}
TASKS = {"image-embedding": "image-feature-extraction", "text-embedding": "feature-extraction"}
HUB_DATA = re.compile(r"[\w.-]+/[\w.-]+")  # a local path is told by its name alone, see `cards.without_places`
OWN, SYNTHETIC = "own", "synthetic"  # kinds of data that no data set of the hub is


def card(head: ModelCardData, body: Sequence[str]) -> str:
    """A whole README.md. Raises ValueError where the head is none."""
    return str(ModelCard("\n".join(["---", head.to_yaml(), "---", "", *body])))


def metadata_of(source: Path) -> dict[str, Any]:
    """What the README.md of a model says in its head; nothing where there is none, or none that can be read."""
    try:
        return metadata_load(source / "README.md") or {}
    except Exception:  # whatever stands in a file that people write
        return {}


def metadata(document: dict[str, Any], source: Path, tags: Sequence[str] = TAGS) -> ModelCardData:
    """Of the report of `comp prune`. source: the folder of the dense model, whose card is asked first."""
    base, metrics = document["base_model"], (document.get("quality") or {}).get("metrics") or {}
    told = kept_of(source)
    told.setdefault("pipeline_tag", pipeline_of(document.get("architecture"), document.get("task")))
    return ModelCardData(
        base_model=base if "/" in base else None,
        library_name="transformers",
        metrics=list(metrics) or None,
        tags=list(tags),
        model_name=model_name(document) if metrics else None,
        eval_results=results(document, told["pipeline_tag"]),
        **told,
    )


def kept_of(source: Path) -> dict[str, Any]:
    """What holds of a model whatever is removed of it."""
    known = metadata_of(source).items()
    return {name: value for name, value in known if name in KEPT and isinstance(value, str | list)}


def pipeline_of(architecture: str | None, task: str | None) -> str | None:
    """The kind of pipeline that takes a stock class; None where it is not certain, as for image-text matching."""
    taken = (name for name, classes in CLASSES.items() if architecture in classes.values())
    return next(taken, TASKS.get(task or ""))


def model_name(document: dict[str, Any]) -> str:
    """What results are said to be of: the repository, else the dense model and the ratio."""
    if pushed := document["options"].get("push_to_hub"):
        return str(pushed)
    return f"{document['base_model']}, compact at ratio {document['ratio']:.2f}"


def results(document: dict[str, Any], pipeline: str | None) -> list[EvalResult] | None:
    """The metrics of the compact model, and of the dense one on the same samples; None where nothing was labelled."""
    quality = document.get("quality") or {}
    if not quality.get("metrics"):
        return None
    named = (document["options"].get("data") or {}).get("data")
    kind = SYNTHETIC if named is None else named if HUB_DATA.fullmatch(named) else OWN
    about = {"task_type": pipeline or document["task"], "dataset_type": kind, "dataset_name": quality["data"]}
    return [
        EvalResult(metric_type=name, metric_value=round(value[side], 5), metric_name=f"{name}{said}", **about)
        for side, said in (("compact", ""), ("dense", " of the dense model"))
        for name, value in quality["metrics"].items()
    ]


def graphs_metadata(document: dict[str, Any], source: Path) -> ModelCardData:
    """Of the report of `comp export`. source: the folder of the compact checkpoint."""
    base = document["source"].get("base_model") or ""
    told = kept_of(source)
    told.setdefault("pipeline_tag", pipeline_of(document["architecture"], document["source"].get("task")))
    if "/" in base and document["quantization"]:  # one of the relations that the hub knows; there is none for what is pruned
        told["base_model_relation"] = "quantized"
    return ModelCardData(
        base_model=base if "/" in base else None,
        library_name=LAYOUTS[1] if document["layout"] == LAYOUTS[1] else None,
        tags=["comp", "onnx", "onnxruntime"],
        **told,
    )
