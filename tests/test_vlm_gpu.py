"""Decoders that read images, compact, on a GPU: they say what they say on a CPU, in every way they are run there.

    pytest -m gpu tests/test_vlm_gpu.py

Run so where there is no GPU, the same is compared on the CPU with itself.
"""

import copy
from functools import cache

import pytest
import torch
from tiny import BEGIN, DECODERS, END, IMAGE, STOP, VIDEO
from torch.nn.attention import SDPBackend, sdpa_kernel

from comp_cli.data.batches import random_inputs
from comp_cli.families import find_family
from comp_cli.measure.decoding import cache_bytes, placed, prompt_of, read, weight_of
from comp_cli.plan import Plan, TokenStage, dense_plan
from comp_cli.runtime.kept_cache import KeptLayer
from comp_cli.runtime.modeling_comp_vlm import make_compact

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASS = {"llava", "llava-next", "internvl"}  # whose towers have [CLS]
NEW = 12
STAGES = {
    "class": (TokenStage(0, "cls-clusters", 9, settings={"centre_share": 0.4}), TokenStage(2, "cluster-merge", 6)),
    "others": (TokenStage(1, "last-attention", 8), TokenStage(3, "key-norm", 4)),
    "stride": (TokenStage(0, "stride", 8), TokenStage(3, "stride", 3)),  # whatever the precision, the same tokens
}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@cache
def dense(family):
    torch.manual_seed(0)
    return DECODERS[family][0]().eval().requires_grad_(False)


def compact(family, stages, dtype=torch.float32, device=DEVICE):
    model = copy.deepcopy(dense(family))
    model.config.architectures = [type(model).__name__]
    config = model.config.to_dict()
    described, architecture, _ = find_family(config)
    plan = Plan(architecture, dense_plan(config, described, architecture).towers, STAGES[stages])
    make_compact(model, plan.comp_block(described, config))
    return model.to(device, dtype)


def prompts(family, padding=0, batch=2):
    """Of samples with an image each; the last one is shorter than the others, and filled up at the left."""
    model = dense(family)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    found = prompt_of(random_inputs(config, find_family(config.to_dict())[0], batch, 12))
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if padding and name in found:
            row = found[name][-1]
            found[name][-1] = torch.cat([torch.zeros_like(row[:padding]), row[:-padding]])
    return found


def written(model, prompt, **options):
    weight = weight_of(model)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    suppressed = [IMAGE, VIDEO, BEGIN, STOP, END]
    with torch.inference_mode():
        return model.generate(**placed(prompt, weight), **options, suppress_tokens=suppressed).cpu()[:, -NEW:]


def way(family):
    return "class" if family in CLASS else "others"


def near(found, family, prompt, dense_found):
    """Logits of the compact model in lower precision are about as near to its exact ones as those of the dense model to its
    own: the rounding of one model is not that of the other."""
    assert found.isfinite().all()
    exact, exact_dense = (read(m, prompt).logits for m in (compact(family, "stride", device="cpu"), dense(family)))
    assert error(found, exact) < 6 * error(dense_found, exact_dense)


def error(found, exact):
    """Root mean square, of logits in any precision."""
    return float((found.float().cpu() - exact).square().mean().sqrt())


def dense_there(family, dtype=torch.float32):
    return copy.deepcopy(dense(family)).to(DEVICE, dtype)


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_decoding_is_that_of_the_cpu(family):
    prompt, (there, here) = (
        prompts(family, padding=3),
        (compact(family, way(family), device=place) for place in (DEVICE, "cpu")),
    )
    assert torch.equal(written(there, prompt), written(here, prompt))
    torch.testing.assert_close(read(there, prompt).logits.cpu(), read(here, prompt).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(family, dtype):
    prompt = prompts(family, padding=3)
    found = read(compact(family, "stride", dtype), prompt).logits
    assert found.dtype == dtype
    near(found, family, prompt, read(dense_there(family, dtype), prompt).logits)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rules_choose_in_half_precision(family, dtype):
    """What a rule makes of rounded numbers may differ, not how much it keeps."""
    model, prompt = compact(family, way(family), dtype), prompts(family)
    held = [
        [layer.keys.shape[2] for layer in read(m, prompt).past_key_values.layers] for m in (model, compact(family, way(family)))
    ]
    assert held[0] == held[1] and held[0][-1] < held[0][0] + (family in CLASS)
    assert written(model, prompt).shape == (2, NEW)


@pytest.mark.parametrize("family", DECODERS)
def test_a_static_cache_says_the_same(family):
    model, prompt = compact(family, way(family)), prompts(family, padding=3)
    assert torch.equal(written(model, prompt, cache_implementation="static"), written(model, prompt))


@pytest.mark.parametrize("family", DECODERS)
def test_no_mask_is_made_where_nothing_is_padded(family):
    """The flash kernel takes none: it would be refused."""
    if family == "paligemma":
        pytest.skip("reads its prompt in both directions, which is a mask")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model, prompt = compact(family, "stride", dtype), prompts(family, batch=1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = read(model, prompt).logits
    with sdpa_kernel(SDPBackend.MATH):
        expected = read(model, prompt).logits
    exact = read(compact(family, "stride", device="cpu"), prompt).logits
    assert error(found, exact) < 3 * error(expected, exact) + 1e-4


@pytest.mark.parametrize("family", DECODERS)
def test_autocast(family):
    prompt = prompts(family, padding=3)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, of_dense = (read(m, prompt).logits for m in (compact(family, "stride"), dense_there(family)))
        assert written(compact(family, way(family)), prompt).shape == (2, NEW)
    near(found, family, prompt, of_dense)


@pytest.mark.parametrize("family", DECODERS)
def test_the_cache_is_smaller(family):
    prompt = prompts(family)
    model = compact(family, way(family))
    less, whole = (read(m, prompt).past_key_values for m in (model, dense_there(family)))
    assert cache_bytes(less) < cache_bytes(whole)
    assert any(isinstance(layer, KeptLayer) for layer in less.layers)
    assert [layer.get_seq_length() for layer in less.layers] == [layer.get_seq_length() for layer in whole.layers]
