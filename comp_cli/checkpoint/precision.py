"""The precision of weights: each tensor is written in the one that it had, and loads without being rounded."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from .header_check import read_headers
from .weight_files import files_of

KNOWN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored(folder: Path) -> dict[str, str]:
    """The precision of every tensor in the files of a checkpoint, as safetensors spells it: {"logit_scale": "F32"}."""
    names = [path.name for path in files_of(folder)]
    return {name: header.dtype for name, header in read_headers(folder, names).items()}


def checkpoint_dtypes(folder: Path, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The precision that each floating-point tensor of a model, loaded in fp32, has in its checkpoint.

    A tensor that has another name there gets the usual one of the file that holds its numbers. Raises RefusedError for weights
    in a precision that comp does not compute in: fp64, fp8 and integers would be changed without a word."""
    there = stored(folder)
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    renamed = floats.keys() - there.keys()
    for name, kind in there.items():
        if kind not in KNOWN and (name in floats or (renamed and name not in state and kind.startswith(("F", "float")))):
            raise RefusedError(
                f"{folder}: weight {name} is {kind}; comp reads fp32, bf16 and fp16.",
                hint="Load it with transformers, .to(torch.float32), save_pretrained, and give that folder.",
            )
    usual = [KNOWN[kind] for kind, _ in Counter(there.values()).most_common() if kind in KNOWN]

    def exact(tensor: Tensor) -> torch.dtype:
        return next((dtype for dtype in usual if torch.equal(tensor.to(dtype).float(), tensor)), torch.float32)

    return {name: exact(tensor) if name in renamed else KNOWN[there[name]] for name, tensor in floats.items()}


def in_precision(own: Mapping[str, torch.dtype], state: Mapping[str, Tensor], wanted: torch.dtype) -> dict[str, torch.dtype]:
    """What is written where the user names a precision: scalars, such as the scale of all logits, stay in fp32."""
    return {name: torch.float32 if state[name].numel() == 1 else wanted for name in own}


def of_the_whole(dtypes: Mapping[str, torch.dtype], state: Mapping[str, Tensor]) -> torch.dtype:
    """What config.json says and a loader makes of all matrices: one that holds each of them exactly. Scalars aside, which the
    runtime keeps in fp32."""
    found = torch.float32
    for number, dtype in enumerate({dtypes[name] for name in dtypes if state[name].numel() > 1}):
        found = torch.promote_types(found, dtype) if number else dtype
    return found


def round_as_written(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the weights of a model the values that they will have in its file; their precision in memory stays. In place, but
    not where they are shared with another model."""
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, dtype in dtypes.items():
        weights[name].data = weights[name].data.to(dtype).to(weights[name].dtype)


def as_written(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a model in the precision that they have in its file; those that are no floats as they are."""
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in state.items()}


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its matrices in another precision, and scalars in fp32; in place."""
    scalars = {name: p.data.float() for name, p in model.named_parameters() if p.is_floating_point() and p.numel() == 1}
    model.to(dtype)
    for name, value in scalars.items():
        model.get_parameter(name).data = value
    return model
