"""Tiny models of the real classes, built from a config: no network, seconds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

WORDS = "a an red blue circle square and left right of above two three small large".split()


def blip_config(**changes):
    """72 wide, 5 layers, 6 heads, FFN 200: nothing is a power of two, text and vision differ in depth."""
    from transformers import BlipConfig

    common = {"hidden_size": 72, "num_attention_heads": 6, "intermediate_size": 200, "initializer_range": 0.2}
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": None}
    text = common | ids | {"num_hidden_layers": 4, "vocab_size": 5 + len(WORDS), "max_position_embeddings": 24}
    vision = common | {"num_hidden_layers": 5, "image_size": 48, "patch_size": 8}
    text |= changes.pop("text", {})
    vision |= changes.pop("vision", {})
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16, **changes)
    config.architectures = ["BlipForImageTextRetrieval"]
    return config


def blip_processor(image_size: int = 48):
    from transformers import BertTokenizerFast, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=24)
    return BlipProcessor(BlipImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(2)


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
    from comp_cli.output import Output
    from comp_cli.prune import Options, prune

    folder = tmp_path_factory.mktemp("compact") / "compact"
    sizes = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12}
    prune(Options(str(tiny_folder), 0.7, method="joint", device="cpu", **sizes), folder, Output("quiet"))
    return folder


@pytest.fixture(scope="session")
def served(compact_folder) -> dict[str, Path]:
    """The compact model as ONNX, "whole" and "split"."""
    from comp_cli import export
    from comp_cli.output import Output

    folders = {name: compact_folder.with_name(f"served-{name}") for name in ("whole", "split")}
    for name, folder in folders.items():
        export.export(compact_folder, folder, Output("quiet"), export.Options(split=name == "split"), overwrite=False)
    return folders


@pytest.fixture(scope="session")
def dense(tiny_folder):
    from comp_cli.output import Output
    from comp_cli.workbench import open_dense

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
    from dataclasses import replace

    generator = torch.Generator().manual_seed(2)

    def some(count: int, least: int) -> tuple[int, ...]:
        kept = int(torch.randint(least, count + 1, (1,), generator=generator))
        return tuple(sorted(torch.randperm(count, generator=generator)[:kept].tolist()))

    def cut(layer, keep):
        attention = replace(layer.attention, heads=some(6, 1))
        cross = replace(layer.cross, heads=some(6, 1)) if layer.cross else None
        return replace(layer, attention=attention, cross=cross, ffn=some(200, 8), keep=keep)

    keeps = {"vision": [30, None, 19, 11, None], "language": [None, 9, None, 6]}
    towers = tuple(
        replace(tower, layers=tuple(cut(layer, keep) for layer, keep in zip(tower.layers, keeps[tower.name], strict=True)))
        for tower in dense.plan.towers
    )
    return replace(dense.plan, towers=towers)
