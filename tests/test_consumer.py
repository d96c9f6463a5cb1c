"""Snippets of docs/export.md, as somebody runs them who has neither torch nor comp: in an environment of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

import comp_cli
from comp_cli.checkpoint.loading import load_processor
from comp_cli.data import scenes

ROOT = Path(__file__).parent.parent
PACKAGES = ["onnxruntime", "numpy", "pillow", "tokenizers"]


def snippets(title: str = "Run the ONNX graph") -> list[str]:
    section = (ROOT / "docs" / "export.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def constraints() -> Path:
    """The set of versions that is tested here: the pinned one, or the newest."""
    pinned = f"transformers=={transformers.__version__}" in (ROOT / "constraints.txt").read_text()
    return ROOT / ("constraints.txt" if pinned else "constraints-newest.txt")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A fresh environment with what the snippets need and nothing else."""
    venv = tmp_path_factory.mktemp("consumer") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    found = venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [found, "-m", "pip", "install", "-q", "--retries", "1", "-c", constraints(), *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch {', '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
    return found


@pytest.fixture(scope="module")
def place(served, tmp_path_factory) -> Path:
    """Both kinds of export and an image, under the names of the page."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(served["whole"], folder / "blip-compact-onnx")
    shutil.copytree(served["split"], folder / "blip-compact-split")
    example = next(iter(scenes.examples("test", 1)))
    scenes.render(example.scene, example.background).save(folder / "scene.png")
    return folder


def torch_scores(compact_folder: Path, image: Path, texts: list[str]) -> np.ndarray:
    inputs = load_processor(compact_folder)(
        images=[Image.open(image)] * len(texts), text=texts, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return comp_cli.load(compact_folder)(**inputs).itm_score.numpy()


def test_the_snippets_are_short():
    first, second = snippets()
    assert len(first.splitlines()) <= 22 and len(second.splitlines()) <= 15


def test_the_snippets_agree_with_torch(python, place, compact_folder):
    first, second = snippets()
    script = "\n".join([first, second, "import sys", "print(*score[0], *scores.ravel(), 'torch' in sys.modules)"])
    done = subprocess.run([python, "-I", "-c", script], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *spoken, numbers = done.stdout.strip().splitlines()
    *found, has_torch = numbers.split()
    assert has_torch == "False"
    texts = re.findall(r'"((?:a|two) [^"]*)"', first + second)
    assert len(texts) == 3
    expected = torch_scores(compact_folder, place / "scene.png", texts)
    np.testing.assert_allclose(np.array(found, float).reshape(3, 2), expected, atol=1e-2)
    assert spoken[0].startswith("itm_score [")


def test_the_snippet_fits_a_model_that_crops_its_pictures(clip, tmp_path):
    """CLIP, under the name of the page, and a photo that is stored on its side."""
    folder, served = clip
    turned = Image.Exif()
    turned[0x0112] = 6
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 60))
    noise.save(tmp_path / "scene.png", format="JPEG", exif=turned)
    shutil.copytree(served, tmp_path / "blip-compact-onnx")
    script = "\n".join(["import sys", "sys.modules['torch'] = None", snippets()[0], "print(*score[0])"])
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named, found = done.stdout.splitlines()
    image = load_image(str(tmp_path / "scene.png"))
    inputs = load_processor(folder)(images=image, text="a small red circle", return_tensors="pt")
    with torch.inference_mode():
        expected = comp_cli.load(folder)(**inputs).logits_per_image[0]
    np.testing.assert_allclose(np.array(found.split(), float), expected, atol=1e-3)
    assert named.startswith("logits_per_image")


def test_the_page_loads_a_checkpoint_in_both_ways(compact_folder, tmp_path):
    shutil.copytree(compact_folder, tmp_path / "blip-compact")
    (code,) = snippets("Load a checkpoint")
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(type(model).__name__, type(processor).__name__)"],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["CompactBlipForImageTextRetrieval", "BlipProcessor"]


def test_the_package_says_that_it_is_typed():
    assert (Path(comp_cli.__file__).parent / "py.typed").is_file()
