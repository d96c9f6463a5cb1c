"""The weights of a compact model that is larger than memory, written layer by layer while they are made."""

import math
from pathlib import Path

from torch import Tensor, nn

from ..checkpoint.header_check import as_named_now, check_shapes, on_meta, read_headers
from ..checkpoint.loading import check_finite, check_sizes, describe, load_processor, quiet_libraries
from ..checkpoint.on_disk import put
from ..checkpoint.runtimes import runtime_of
from ..checkpoint.weight_files import check_checkpoint
from ..engine.slicing import padded, slice_state
from ..files.shards import ShardWriter
from ..files.tensors import PIECE, torch_dtype
from ..plan import Plan
from .described import check_complete
from .streamed import StreamedDense


class CompactWriter:
    """Safetensors files of a plan's model, every tensor in the precision that it had."""

    def __init__(self, folder: Path, dense: StreamedDense, plan: Plan):
        """plan: as it is written, see Plan.told_apart."""
        self.dense, self.plan = dense, plan
        shapes = slice_state(dense.state, dense.family, plan)
        kinds = {name: (dense.weights.header(name).dtype, tuple(tensor.shape)) for name, tensor in shapes.items()}
        self.files = ShardWriter(folder, kinds)

    @property
    def unchanged(self) -> list[str]:
        """The tensors of all that is no layer of the decoder."""
        tower = self.dense.decoder
        return [name for name in self.dense.state if not name.startswith(f"{tower.encoder}.{tower.layers}.")]

    def copy(self, name: str) -> None:
        """Copy a tensor as it is, in pieces. Raises RefusedError where one of its numbers is none."""
        if not self.dense.weights.places[name][1].shape:
            return self.files.write(name, self.dense.weights.read(name))
        for first, rows in self.dense.weights.pieces(name):
            check_finite({f"{name}, from row {first} on,": rows}, self.dense.weights.folder)
            self.files.write(name, rows, first)

    def layer(self, index: int, layer: nn.Module) -> None:
        """Write a layer of the decoder as it is now, and give it the values that it has in the file."""
        tower = self.dense.decoder
        root = self.dense.root(tower, index)
        state: dict[str, Tensor] = {}
        for name, parameter in list(layer.named_parameters()):
            stored = torch_dtype(self.dense.weights.header(f"{root}.{name}").dtype)
            state[f"{root}.{name}"] = parameter.detach().to(stored)
            put(layer, name, state[f"{root}.{name}"].to(parameter.dtype))
        if self.plan.tower(tower.name).layers[index].padding:  # which no other layer has, see Plan.told_apart
            state = padded(state, self.dense.family, self.plan)
        for name, tensor in state.items():
            self.files.write(name, tensor)


def check_folder(folder: Path, architecture: str) -> None:
    """Weights, config.json and processor of a written folder must fit, by what headers say. Raises RefusedError where they do
    not."""
    config, family = describe(folder)
    files = check_checkpoint(folder, allow_pickle=False)
    compact_class = runtime_of(family).compact_class(architecture)
    with quiet_libraries():
        compact = on_meta(compact_class, config)
    headers = as_named_now(read_headers(folder, files), config, family, compact_class)
    check_sizes(config.to_dict(), family, headers, folder)
    check_shapes(headers, compact, folder)
    check_complete(headers, compact, str(folder))
    load_processor(folder)


def working_set(dense: StreamedDense, plan: Plan, samples: int, batch: int) -> int:
    """About the bytes that a search layer by layer takes at most: a layer in fp32 and, whichever is more, another one with two
    Gram matrices of its widest part, or three of these in fp64; what is outside of the layers, a batch inside of a layer, and
    the states and logits of `samples` pairs."""
    tower = dense.decoder
    layers = plan.tower(tower.name).layers
    largest = max(
        sum(math.prod(tensor.shape) for name, tensor in dense.state.items() if name.startswith(f"{dense.root(tower, index)}."))
        for index in range(len(layers))
    )
    width = max(len(units.units) * units.width for layer in layers for units in layer.parts.values())
    dim = dense.state[dense.embedding].shape[1]
    tokens = sum(dense.reference.tokens[stream.name] for stream in tower.streams)
    inside = min(batch, samples) * tokens * (4 * width + 8 * dim) * 4
    outside = sum(tensor.numel() * 4 for tensor in dense.outside.values())
    words = dense.state[dense.head].shape[0]
    whole = 4 * largest + max(4 * largest + 12 * width**2, 24 * width**2)
    pieces = 3 * min(PIECE, 2 * words * dim)  # as they are in the file, and in fp32
    return outside + whole + inside + samples * (tokens * dim + 4 * words) * 4 + pieces
