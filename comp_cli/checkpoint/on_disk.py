"""A model whose weights stay on disk: built without them, and filled layer by layer while a layer runs, on any device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights

from ..errors import RefusedError
from ..families import Family
from ..files.store import TensorHeader
from ..files.tensors import Place, read_pieces, read_places, read_rows
from .header_check import as_named_now
from .loading import check_finite
from .runtimes import runtime_of

KNOWN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Weights:
    """Where the tensors of a checkpoint are, by the names that the model has for them today. All are computed in fp32, on one
    device."""

    folder: Path
    places: Mapping[str, tuple[Path, Place]]
    device: torch.device

    def header(self, name: str) -> TensorHeader:
        place = self.places[name][1]
        return TensorHeader(place.dtype, place.shape)

    def read(self, name: str) -> Tensor:
        """A whole tensor in fp32. Raises RefusedError where one of its numbers is none."""
        with torch.inference_mode(False):  # what is made under it could not be differentiated through
            found = read_rows(*self.places[name]).to(self.device).float()  # which takes half of the way in half precision
        check_finite({name: found}, self.folder)
        return found

    def below(self, root: str) -> list[str]:
        """Names of the tensors of a module."""
        return [name for name in self.places if name.startswith(f"{root}.")]

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Some rows of a matrix, in fp32. index: (rows,) -> (rows, columns)."""
        with torch.inference_mode(False):
            found = torch.cat([read_rows(*self.places[name], row, row + 1) for row in index.tolist()])
            found = found.to(self.device).float()
        check_finite({name: found}, self.folder)
        return found

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A matrix in pieces: the number of the first row, and the rows in the precision of the file, on the CPU."""
        return read_pieces(*self.places[name])

    def computed_pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The same in fp32, on the device."""
        return ((first, rows.to(self.device).float()) for first, rows in self.pieces(name))


def weights_of(
    folder: Path,
    files: list[str],
    config: transformers.PretrainedConfig,
    family: Family,
    architecture: str,
    device: torch.device,
) -> Weights:
    """The weights of a checkpoint of safetensors files, to be computed with on a device. Raises RefusedError for precisions
    that comp does not compute in."""
    there: dict[str, tuple[Path, Place]] = {}
    for file in files:
        there |= {name: (folder / file, place) for name, place in read_places(folder / file).items()}
    headers = {name: TensorHeader(place.dtype, place.shape) for name, (_, place) in there.items()}
    named = as_named_now(headers, config, family, getattr(transformers, architecture))
    for name, header in named.items():
        if header.dtype not in KNOWN:
            hint = "Load it with transformers, .to(torch.float32), save_pretrained, and give that folder."
            raise RefusedError(f"{folder}: weight {name} is {header.dtype}; comp reads fp32, bf16 and fp16.", hint=hint)
    return Weights(folder, dict(zip(named, there.values(), strict=True)), device)


class MatricesOnMeta(TorchFunctionMode):
    """While it is open, what torch's modules make for their weights takes no memory; what is calculated (tables of rotary
    embeddings, positions) is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def without_weights(
    config: transformers.PretrainedConfig, family: Family, architecture: str, device: torch.device
) -> nn.Module:
    """The model of `config.comp` (see `loading.build_compact`), its matrices without memory, what is calculated on a device."""
    with MatricesOnMeta(), no_init_weights():
        model: nn.Module = family.topology.interface(runtime_of(family).compact_class(architecture))(config)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    return model.eval().requires_grad_(False)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a model a weight, a parameter or a buffer."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        with torch.inference_mode(False):
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor


class LayerOnDisk:
    """A layer that holds its weights only while it is filled."""

    def __init__(self, module: nn.Module, load: Callable[[], Mapping[str, Tensor]]):
        """load: the weights of the layer, by their names in it."""
        self.module, self._load = module, load

    @contextmanager
    def filled(self, state: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The layer with its weights, or with others of its sizes, while the context is open."""
        self.fill(state)
        try:
            yield self.module
        finally:
            self.empty()

    def fill(self, state: Mapping[str, Tensor] | None = None) -> None:
        for name, tensor in (self._load() if state is None else state).items():
            put(self.module, name, tensor)

    def empty(self) -> None:
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    nothing = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    module._parameters[name] = nn.Parameter(nothing, requires_grad=False)

    def fills_itself(self) -> None:
        """Whenever it is called, for as long as it runs."""
        self.module.register_forward_pre_hook(lambda module, args: self.fill())
        self.module.register_forward_hook(lambda module, args, output: self.empty(), always_call=True)


def reads_rows(embedding: Any, name: str, weights: Weights) -> None:
    """Let an embedding read the rows of the tokens that it is given, whenever it is called."""
    embedding.padding_idx = None  # of use to gradients only, and no number of what is read
    whole = embedding.weight

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, places = args[0].unique(return_inverse=True)
        put(module, "weight", weights.rows(name, rows))
        return (places, *args[1:])

    def behind(module: Any, args: Any, output: Any) -> None:
        module._parameters["weight"] = whole

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(behind, always_call=True)
