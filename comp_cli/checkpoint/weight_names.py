"""The names of weights: those of a file, and those of the model that reads it. Classes were rebuilt, checkpoints were not; and
save_pretrained goes on writing the old names."""

from collections.abc import Mapping

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..files.store import TensorHeader


def in_names_of(model: nn.Module, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The headers under the names that a model of transformers has for its weights, as its loader would rename them. Raises
    ValueError for weights that are converted on the way (fused, split), so that no name says their shape."""
    conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name, header in headers.items():
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)  # type: ignore[arg-type]
        if converted is not None:
            raise ValueError(f"{name} is converted while it is loaded ({converted}), and is not handed on as it is")
        found[renamed] = header
    return found
