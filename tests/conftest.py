"""Tiny models of the real classes, built from a config: no network, seconds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # of the terminal, which workers are told as well: lines are as in a file
# Threads that share a core wait for one another: no more than there are cores for, and one where workers run side by side.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
THREADS = 1 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1 else min(2, CORES)
if "PYTEST_XDIST_WORKER" in os.environ:  # which has the variables of the process that started it
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

from pathlib import Path  # noqa: E402

import fuzzing  # noqa: E402, F401  (its profiles must be known before a test is read)
import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import WORDS, blip_config, blip_processor, uneven  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def stock():
    """A stock transformers model with random weights."""
    from transformers import BlipForImageTextRetrieval

    torch.manual_seed(0)
    return BlipForImageTextRetrieval(blip_config()).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_folder(stock, tmp_path_factory) -> Path:
    """The same model as a checkpoint folder, as people have it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-blip"
    stock.save_pretrained(folder)
    blip_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compact_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model, compact at ratio 0.7: heads, channels and tokens are gone."""
    import comp_cli

    folder = tmp_path_factory.mktemp("compact") / "compact"
    sizes = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12}
    comp_cli.prune(tiny_folder, ratio=0.7, output=folder, method="joint", device="cpu", **sizes)
    return folder


@pytest.fixture(scope="session")
def served(compact_folder) -> dict[str, Path]:
    """The compact model as ONNX, "whole" and "split"."""
    import comp_cli

    folders = {name: compact_folder.with_name(f"served-{name}") for name in ("whole", "split")}
    for name, folder in folders.items():
        comp_cli.export(compact_folder, output=folder, split=name == "split")
    return folders


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> tuple[Path, Path]:
    """A compact CLIP and its graph: a causal mask in one tower, a fused token in the other."""
    import tiny

    import comp_cli

    place = tmp_path_factory.mktemp("clip")
    sizes = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12}
    dense = tiny.write("clip", place / "dense")
    comp_cli.prune(dense, ratio=0.5, output=place / "compact", method="joint", device="cpu", **sizes)
    comp_cli.export(place / "compact", output=place / "served")
    return place / "compact", place / "served"


@pytest.fixture(scope="session")
def dense(tiny_folder):
    from comp_cli.cli.output import Output
    from comp_cli.models.dense import open_dense

    return open_dense(str(tiny_folder), Output("quiet"), text_tokens=12)


@pytest.fixture(scope="session")
def inputs():
    """Three pairs; the second text is padded."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return {
        "input_ids": torch.randint(5, 5 + len(WORDS), (3, 12), generator=generator) * mask,
        "pixel_values": torch.randn(3, 3, 48, 48, generator=generator),
        "attention_mask": mask,
    }


@pytest.fixture(scope="session")
def uneven_plan(dense):
    """Another number of heads, channels and tokens in every layer."""
    return uneven(dense.plan)
