"""Weights that are shared out while they are tuned (FSDP2), as `accelerate launch --use_fsdp --fsdp_version 2` asks for it.

Every process holds an Nth of the rows of each weight, of its slope and of its two moments; a layer is put together while it
runs. The rows of a batch are shared out as well, as they are without it, and slopes are averaged where they are shared out.
accelerate's own way knows no FSDP on the CPU, and would stay data-parallel there without a word; so its plugin reads what the
launcher was told, and torch's `fully_shard` does the work, on CPUs and GPUs alike.
"""

import os
from collections.abc import Iterable, Mapping

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UsageError
from ..families import Family
from ..options import Training
from .processes import from_main, is_main_process, precision, processes

OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}  # which share out weights too
DATA_PARALLEL = "Data-parallel is accelerate launch --multi_gpu --num_processes N, without a config of it."


def is_sharded() -> bool:
    """Whether the launcher was asked to share out weights."""
    return _is_on("ACCELERATE_USE_FSDP")


def check_launch(training: Training) -> None:
    """Raises UsageError where the launcher was asked to share out the weights of a model in a way that comp does not know, or
    where nothing is tuned with these settings."""
    for variable, name in OTHERS.items():
        if _is_on(variable):
            hint = f"Weights that are tuned can be shared out with --use_fsdp --fsdp_version 2. {DATA_PARALLEL}"
            raise UsageError(f"{name}: comp shares out no weights with it.", hint=hint)
    if is_sharded():
        _check_fsdp(training)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_fsdp(training: Training) -> None:
    if not training.tunes:
        said = "FSDP shares out the weights that are tuned, and nothing is tuned here: the search holds the whole model."
        raise UsageError(said, hint=f"Tuning is --steps N or --epochs E, without --plan-only. {DATA_PARALLEL}")
    if training.stage_share:
        said = "--stage-share: stages slice whole matrices between their steps, which FSDP shares out."
        raise UsageError(said, hint=f"Leave it out, and the plan is tuned when it is found. {DATA_PARALLEL}")
    if processes() == 1:
        raise UsageError("FSDP shares out weights, and there is one process.", hint="Give the launcher --num_processes 2.")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("FSDP 1 is not what comp tunes with.", hint="Give the launcher --fsdp_version 2.")
    plugin, mixed = FullyShardedDataParallelPlugin(), precision(training)
    compiled = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    unknown = {
        "--fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "--fsdp_activation_checkpointing": plugin.activation_checkpointing,  # tokens would leave a second time
        "--fsdp_ignored_modules": plugin.ignored_modules is not None,
        "--fsdp_auto_wrap_policy SIZE_BASED_WRAP": plugin.min_num_params is not None,  # a layer is what is put together
        f"--dynamo_backend {compiled}": compiled != "no",
        f"--mixed-precision {mixed}": mixed not in ("no", "bf16"),  # the loss would have to be scaled
    }
    for name, given in unknown.items():
        if given:
            raise UsageError(f"{name}: comp does not tune so with FSDP.", hint=f"Leave it out. {DATA_PARALLEL}")


def shard(model: nn.Module, family: Family) -> None:
    """Share out the parameters of a model, layer by layer, then what lies around the layers; each process keeps its rows, in
    DTensors. A parameter that is one number stays whole, see `average_slopes`."""
    numbers = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    device = next(model.parameters()).device.type
    mesh, again = init_device_mesh(device, (processes(),)), FullyShardedDataParallelPlugin().reshard_after_forward
    for tower in family.towers:
        for layer in getattr(model.get_submodule(tower.encoder), tower.layers):
            fully_shard(layer, mesh=mesh, reshard_after_forward=again, ignored_params=numbers)
    fully_shard(model, mesh=mesh, ignored_params=numbers)


def average_slopes(numbers: Iterable[Tensor]) -> None:
    """Average over the processes the slopes of parameters that are one number; `fully_shard` does so with the others."""
    for parameter in numbers:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= processes()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together, in every process; all have to ask. One that is not shared out is as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together one by one, on the CPU of the first process; the others, which have to ask, get nothing."""
    found = {}
    for name, tensor in tensors.items():
        put_together = whole(tensor)
        if is_main_process():
            found[name] = put_together.cpu()
    return found


def shared_out(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the first process, one by one, as the parameters of the same names are shared out."""
    found: dict[str, Tensor] = {}
    for name in from_main(lambda: list(tensors)):
        place = like[name]
        tensor = tensors[name] if is_main_process() else torch.empty(place.shape)
        tensor = tensor.to(place.device, place.dtype)
        if isinstance(place, DTensor):
            found[name] = distribute_tensor(tensor, place.device_mesh, place.placements)
        else:
            distributed.broadcast(tensor, src=0)
            found[name] = tensor
    return found
