"""A dense decoder that reads images, larger than memory: described as any other, its weights read from its files while it
runs."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import on_disk
from ..checkpoint.header_check import few
from ..data.batches import Batch
from ..engine.recover import recover_part
from ..engine.scoring import Key, tower_layers
from ..engine.slicing import slice_part
from ..engine.token_ranking import with_score_rows
from ..errors import RefusedError
from ..families import Tower
from ..files.shards import Spool
from ..plan import Plan
from ..topology.base import Written
from .dense import Dense
from .described import Described


class ModelOnDisk(NamedTuple):
    """A model, and the layers of its decoder, which are filled by whoever runs them. Everything else fills itself, or is
    there."""

    module: nn.Module
    layers: list[on_disk.LayerOnDisk]


@dataclass
class StreamedDense(Dense):
    """`state` has the shapes of the weights only. spool: room on the disk for what a run needs again. Everything is computed on
    the device of `weights`."""

    weights: on_disk.Weights
    spool: Spool

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def decoder(self) -> Tower:
        return self.family.decoder_of_images[1]

    @property
    def place(self) -> Written:
        """Where the texts are that are predicted."""
        if self.family.topology.written is None:
            raise ValueError(f"{self.architecture} predicts no texts")
        return self.family.topology.written

    @property
    def embedding(self) -> str:
        """Name of the matrix that embeds tokens."""
        return f"{self.family.topology.image_tokens(self.hf_config.to_dict())['text']}.embed_tokens.weight"

    @property
    def head(self) -> str:
        """Name of the matrix that makes logits: the one that embeds, where checkpoints hold it once."""
        name = f"{self.place.head}.weight"
        return name if name in self.weights.places else self.embedding

    def params(self, plan: Plan) -> int:
        found = dict(self.state)
        for tower in plan.towers:
            for index in range(len(tower.layers)):
                found |= self.sliced(plan, tower.name, index, found)
        return sum(tensor.numel() for tensor in found.values())

    def on_device(self, batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
        return (batch.to(self.device, torch.float32).inputs for batch in batches)

    @cached_property
    def model(self) -> ModelOnDisk:
        """The dense model."""
        return self.of_plan(self.plan)

    def of_plan(self, plan: Plan) -> ModelOnDisk:
        """The model of a plan. Its decoder's layers are loaded as the dense model's are, and fit only those of the dense
        plan."""
        gc.collect()  # the model before this one, whose hooks and modules hold one another
        config = self.hf_config.__class__.from_dict(self.hf_config.to_dict())
        config.comp = plan.comp_block(self.family, self.hf_config.to_dict())
        module = on_disk.without_weights(config, self.family, self.architecture, self.device)
        on_disk.reads_rows(module.get_submodule(self.embedding.rpartition(".")[0]), self.embedding, self.weights)
        layers = []
        for tower in self.family.towers:
            for index, layer in enumerate(tower_layers(module, tower)):
                root = self.root(tower, index)
                found = on_disk.LayerOnDisk(layer, partial(self.layer, root))
                if tower.name == self.decoder.name:
                    layers.append(found)
                else:
                    found.fills_itself()
        for name, tensor in self.outside.items():
            on_disk.put(module, name, tensor)
        return ModelOnDisk(module, layers)

    @cached_property
    def outside(self) -> dict[str, Tensor]:
        """The weights of what is no layer of a tower, and no matrix with a row for each word of the vocabulary."""
        roots = tuple(f"{tower.encoder}.{tower.layers}." for tower in self.family.towers)
        whole = {self.embedding, f"{self.place.head}.weight"}
        return {name: self.weights.read(name) for name in self.state if name not in whole and not name.startswith(roots)}

    def root(self, tower: Tower, index: int) -> str:
        return f"{tower.encoder}.{tower.layers}.{index}"

    def layer(self, root: str) -> dict[str, Tensor]:
        """The weights of a layer by their names in it, fp32."""
        return {name.removeprefix(f"{root}."): self.weights.read(name) for name in self.weights.below(root)}

    def sliced(
        self,
        plan: Plan,
        tower: str,
        index: int,
        state: Mapping[str, Tensor],
        gram: Callable[[Key], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The weights of a layer of a plan, of those of the dense layer, all by their names in the model; recovered where there
        are Gram matrices of its parts."""
        described = self.family.tower(tower)
        root, kept = self.root(described, index), plan.tower(tower).layers[index]
        dense = {name: tensor for name, tensor in state.items() if name.startswith(f"{root}.")}
        found = dict(dense)
        for part in described.parts:
            slice_part(found, root, part, kept.parts[part.name])
        if gram is not None:
            for part in described.parts:
                key, name = (tower, index, part.name), f"{root}.{part.column}"
                found |= recover_part(dense, name, kept.parts[part.name], partial(gram, key))
        return found


def open_streamed(described: Described, spool: Spool, score_rows: int, device: torch.device) -> StreamedDense:
    """A described dense model, to be run from its files on a device. Raises RefusedError for what cannot be computed in, and
    for a layer whose tensors its description does not name."""
    source = described.source
    weights = on_disk.weights_of(
        source.folder, list(described.files), described.hf_config, described.family, described.architecture, device
    )
    config = described.hf_config.__class__.from_dict(described.hf_config.to_dict())
    config.comp = described.plan.comp_block(described.family, described.hf_config.to_dict())
    shapes = on_disk.without_weights(config, described.family, described.architecture, device).state_dict()
    lacking = shapes.keys() - weights.places.keys()
    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in shapes.items() if name not in lacking}
    if extra := weights.places.keys() - shapes.keys():
        said = f"{source.name}: weights and config.json do not agree (unexpected keys: {few(extra)})."
        raise RefusedError(said, hint="comp loads all or nothing.")
    for name, tensor in state.items():
        if weights.header(name).shape != tuple(tensor.shape):
            raise RefusedError(f"{source.name}: the weight {name} is {weights.header(name).shape}, expected {tensor.shape}.")
    return StreamedDense(
        source=source,
        config=described.config,
        family=described.family,
        task=described.task,
        plan=with_score_rows(described.plan, score_rows, described.family),
        reference=described.reference,
        state=state,
        hf_config=described.hf_config,
        processor=described.processor,
        weights=weights,
        spool=spool,
    )
