"""GPUs that are pretended refuse what real ones refuse, and compute what the CPU computes."""

import copy
import gc
import io

import numpy as np
import pytest
import torch
from pretended_gpus import gpus, pretend  # noqa: F401  (a fixture)
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn
from torch.nn import functional as F

A, B = torch.device("cuda", 0), torch.device("cuda", 1)
DIFFERENT = "Expected all tensors to be on the same device"
MIXED = {
    "arithmetic": lambda: torch.ones(3, device=A) + torch.ones(3),
    "two GPUs": lambda: torch.ones(3, 3, device=A) @ torch.ones(3, 3, device=B),
    "written into, on the CPU": lambda: torch.ones(3).add_(torch.ones(3, device=A)),
    "a number on the CPU, written into": lambda: torch.tensor(1.0).add_(torch.tensor(1.0, device=A)),
    "rows of the CPU's by an index on the GPU": lambda: torch.ones(3)[torch.tensor([0], device=A)],
    "rows by an index on another GPU": lambda: torch.ones(3, device=A)[torch.tensor([0], device=B)],
    "index_select by an index on the CPU": lambda: torch.ones(3, device=A).index_select(0, torch.tensor([0])),
    "gather": lambda: torch.ones(3, device=A).gather(0, torch.tensor([0])),
    "values of the CPU's put into rows": lambda: torch.ones(3, device=A).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "cat": lambda: torch.cat([torch.ones(3, device=A), torch.ones(3)]),
    "stack of numbers": lambda: torch.stack([torch.tensor(1.0, device=A), torch.tensor(1.0)]),
    "where": lambda: torch.where(torch.ones(3, dtype=torch.bool), torch.ones(3, device=A), torch.ones(3, device=A)),
    "linear": lambda: nn.Linear(3, 3).to(A)(torch.ones(1, 3)),
    "embedding": lambda: nn.Embedding(3, 3).to(A)(torch.tensor([0])),
    "equal": lambda: torch.equal(torch.ones(3, device=A), torch.ones(3)),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_meet(name, gpus):  # noqa: F811
    with pytest.raises(RuntimeError, match=DIFFERENT):
        MIXED[name]()


@pytest.mark.parametrize("inferred", [False, True])
def test_what_may_cross_does(gpus, inferred):  # noqa: F811
    with torch.inference_mode(inferred):
        here = torch.arange(3.0)
        there = here.to(A)
        assert there.device == A and there.is_cuda and not there.is_cpu and isinstance(there, torch.Tensor)
        assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)  # numbers of the CPU
        assert torch.equal(there[torch.tensor([2, 0])].cpu(), here[[2, 0]])  # rows by an index of the CPU
        there[:2] = torch.ones(2)  # a copy
        here[1:] = there[:2]
        assert there.tolist() == [1, 1, 2] and here.tolist() == [0, 1, 1]
        assert there.to(B).device == B and there.to(B).cpu().tolist() == [1, 1, 2]
        assert torch.tensor([there[0], 5.0], device="cuda:1").tolist() == [1, 5]


def test_a_tensor_that_is_there_already_is_not_copied(gpus):  # noqa: F811
    there = torch.ones(3, device=A)
    assert there.to("cuda") is there and there.to(A) is there and there.cuda() is there and there.float() is there
    assert there.to(there) is there and there.to(B) is not there


def test_where_tensors_are_made(gpus):  # noqa: F811
    assert torch.zeros(3, device="cuda").device == A and torch.device("cuda") != A
    like = torch.ones(2, device=B)
    made = [torch.zeros_like(like), like.new_ones(3), torch.arange(3, device=like.device), torch.eye(2, device="cuda:1")]
    made += [torch.as_tensor([1, 2], device=B), torch.tensor(3, device=B), torch.empty_like(like), like.nonzero(), like.sum()]
    assert {each.device for each in made} == {B}
    assert torch.ones(3, device="meta").device.type == "meta" and like.to("meta").device.type == "meta"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:2")
    with pytest.raises(RuntimeError, match="for generator but found 'cpu'"):
        torch.rand(3, device=A, generator=torch.Generator())


def test_numpy_needs_the_cpu(gpus):  # noqa: F811
    there = torch.ones(3, device=B)
    for way in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="can't convert cuda:1 device type tensor to numpy"):
            way()
    assert there.cpu().numpy().tolist() == [1, 1, 1] and float(there.sum()) == 3 and f"{there.sum():.1f}" == "3.0"


def test_views_share_and_in_place_writes_are_seen(gpus):  # noqa: F811
    whole = torch.zeros(2, 3, device=A)
    row = whole[1]
    row.add_(1)
    whole.view(-1)[0] = 7
    assert whole.tolist() == [[7, 0, 0], [1, 1, 1]] and row.data_ptr() == whole.data_ptr() + 12
    out = torch.empty(0, device=A)
    torch.mm(whole, whole.T, out=out)
    assert out.shape == (2, 2) and out.tolist() == [[49, 7], [7, 3]]
    same = out
    same.unsqueeze_(0)
    assert out.shape == (1, 2, 2)


def test_slopes_cross_devices(gpus):  # noqa: F811
    torch.manual_seed(0)
    here, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    there = weight.to(B).requires_grad_()
    with torch.enable_grad():
        F.linear(here.to(B), there).to(A).tanh().cpu().sum().backward()
    slope = 1 - (here @ weight.T).tanh() ** 2
    assert there.grad.device == B and here.grad.device.type == "cpu"
    torch.testing.assert_close(here.grad, slope.detach() @ weight)
    torch.testing.assert_close(there.grad.cpu(), (slope.T @ here).detach())


def test_modules_move_with_their_ties_and_train(gpus):  # noqa: F811
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 5), nn.LayerNorm(5), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    twin = copy.deepcopy(model)
    weight = model[0].weight
    assert model.to(B)[0].weight is weight and model[2].weight is weight and isinstance(weight, nn.Parameter)
    for each, device in ((model, B), (twin, torch.device("cpu"))):
        optimizer = torch.optim.AdamW(each.parameters(), 0.1)
        F.cross_entropy(each(torch.arange(5, device=device)), torch.arange(5, device=device)).backward()
        optimizer.step()
    assert {tensor.device for tensor in model.state_dict().values()} == {B}
    assert torch.equal(copy.deepcopy(model).to("cpu")[0].weight, twin[0].weight)
    twin.load_state_dict(model.state_dict())
    assert twin[0].weight.device.type == "cpu"
    model.to("cpu")
    assert type(model[0].weight) is nn.Parameter and torch.equal(model[0].weight, twin[0].weight)


def test_files_hold_what_the_gpu_holds(gpus):  # noqa: F811
    there = torch.arange(6.0, device=A).view(2, 3)
    assert torch.equal(load_bytes(save_bytes({"a": there}))["a"], there.cpu())
    file = io.BytesIO()
    torch.save(there, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).tolist() == there.tolist()


def test_autocast_is_for_the_gpu(gpus):  # noqa: F811
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=A)
    with torch.autocast("cuda", torch.bfloat16):
        assert (there @ there).dtype == torch.bfloat16 and (here @ here).dtype == torch.float32
        assert F.linear(there, there).softmax(-1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (there @ there).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (there @ there).dtype == torch.float32


def test_attention_is_that_of_the_cpu(gpus):  # noqa: F811
    torch.manual_seed(0)
    parts = torch.randn(3, 2, 4, 5, 8)
    expected = F.scaled_dot_product_attention(*parts, is_causal=True)
    found = F.scaled_dot_product_attention(*parts.to(B), is_causal=True)
    assert found.device == B
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-5)


def test_memory_is_counted_by_storage():
    with pretend(1, room=1000) as memory:
        gc.collect()
        before = memory.alive[0]
        whole = torch.zeros(50, device="cuda")
        parts = whole.split(10)
        assert memory.alive[0] - before == 200 and torch.cuda.mem_get_info() == (1000 - memory.alive[0], 1000)
        del whole
        assert memory.alive[0] - before == 200 and len(parts) == 5
        del parts
        assert memory.alive[0] == before and torch.cuda.max_memory_allocated("cuda:0") >= 200
        torch.cuda.reset_peak_memory_stats(0)
        assert torch.cuda.max_memory_allocated() == before


def test_nothing_is_left_behind():
    with pretend(1):
        assert torch.cuda.is_available() and torch.cuda.get_device_name("cuda") == "pretended GPU 0"
        there = torch.ones(3, device="cuda")
    assert torch.cuda.device_count() == 0 or torch.version.cuda is not None
    assert not torch.__future__.get_swap_module_params_on_conversion() and type(torch.ones(3)) is torch.Tensor
    assert (there * 2).cpu().tolist() == [2, 2, 2]  # what is there stays there
