"""Models from folders: dense ones through transformers, compact ones through the runtime. Nothing is half loaded."""

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ..errors import CompError, DeviceError, RefusedError, UsageError, first_line
from ..families import Family, check_supported, compact_block, find_architecture, find_family, tower_config
from ..files.store import TensorHeader, read_config, read_json
from .folder_check import check_folder, check_report, shown
from .header_check import as_named_now, check_depth, check_shapes, few, on_meta, read_headers
from .places import copy_settings, without_places
from .plan_check import check_block
from .processor_check import check_code, check_processor
from .runtimes import runtime_of
from .weight_files import check_checkpoint

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "vocab_size",
    "max_position_embeddings",
)
SIDES = ("image_size", "patch_size")  # which may be given as height and width
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1". Raises DeviceError where the device is not there: never a silent fall-back."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "Use auto, cpu, cuda or cuda:0. A run has one device; a model that is larger may go with --device cpu."
        raise UsageError(f"--device {name}: not a device.", hint=hint) from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: comp runs on cpu and cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "no GPU answers"
        raise DeviceError(f"--device {name}: {built}.", hint="Use --device cpu, or a machine with an NVIDIA GPU.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s).")
    return device


def pick_dtype(name: str | None) -> torch.dtype | None:
    """fp32, bf16, fp16, or None for the checkpoint's own."""
    if name is not None and name not in DTYPES:
        raise UsageError(f"--dtype {name}: unknown.", hint=f"Use one of {', '.join(DTYPES)}.")
    return DTYPES[name] if name else None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' bars and advice away from the user's screen; errors still rise."""
    level = transformers.logging.get_verbosity()
    onnx_log = logging.getLogger("torch.onnx")
    onnx_level = onnx_log.level
    onnx_log.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        onnx_log.setLevel(onnx_level)


def load_model(
    folder: Path, *, family: Family | None = None, dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> nn.Module:
    """The model of a checkpoint folder, dense or compact, in eval mode on the CPU; it answers as its class does, or as the
    family is described.

    Raises RefusedError for a folder that `check_checkpoint` refuses, a plan that cannot be, and where weights are missing, left
    over, not finite, of another size than the config says (which is compared before anything is built), or not those of comp's
    own report."""
    files = check_checkpoint(folder, allow_pickle=allow_pickle)
    config, described = describe(folder)
    architecture = find_architecture(config.to_dict())
    compact = compact_block(config.to_dict()) is not None
    model_class: Any = runtime_of(described).compact_class(architecture) if compact else getattr(transformers, architecture)
    model_class = family.topology.interface(model_class) if family else model_class
    headers: Mapping[str, TensorHeader] = read_headers(folder, files)
    options = {"use_safetensors": files[0].endswith(".safetensors"), "local_files_only": True}
    with sentences(folder), quiet_libraries():
        headers = as_named_now(headers, config, described, getattr(transformers, architecture))
        check_sizes(config.to_dict(), described, headers, folder)
        check_shapes(headers, on_meta(model_class, config), folder)
        model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **options)
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)}
    if problems:
        said = "; ".join(f"{name.replace('_', ' ')}: {few(keys)}" for name, keys in problems.items())
        raise RefusedError(
            f"{folder}: weights and config.json do not agree ({said}).",
            hint="comp loads all or nothing: missing weights would be randomly initialised.",
        )
    check_finite(model.state_dict(), folder)
    check_report(folder)  # last: what is above says more exactly what is wrong
    return model.eval()


@contextmanager
def sentences(folder: Path) -> Iterator[None]:
    """transformers raises many kinds for a broken checkpoint; all become RefusedError, in a sentence."""
    try:
        yield
    except CompError:
        raise
    except Exception as error:
        raise RefusedError(
            f"{folder}: the checkpoint does not load: {first_line(error)}",
            hint="Weights and config.json must belong together. COMP_DEBUG=1 prints the full traceback.",
        ) from error


def describe(folder: Path) -> tuple[transformers.PretrainedConfig, Family]:
    """A folder's config with its defaults filled in, and its family. Raises RefusedError where it is broken, or of no
    family."""
    family, architecture, _ = find_family(read_config(folder))
    with sentences(folder), quiet_libraries():
        config = getattr(transformers, architecture).config_class.from_pretrained(folder, local_files_only=True)
    check_supported(config.to_dict(), family)
    check_positive(config.to_dict(), family, folder)
    return config, family


def check_positive(config: dict[str, Any], family: Family, folder: Path) -> None:
    """Raises RefusedError where a size is no number from one, or the heads do not divide the width."""
    for tower in family.towers:
        sizes = tower_config(config, tower)
        for name, value in sizes.items():
            sides = value if name in SIDES and isinstance(value, list | tuple) and value else [value]
            if name in SIZES and not all(type(side) is int and side >= 1 for side in sides):
                place = f"{tower.config}.{name}".removeprefix(".")
                raise RefusedError(f"{folder}: config.json: {place} is {shown(value)}; expected 1 or more.")
        attention = tower.self_attention
        width, heads = sizes["hidden_size"], sizes[attention.queries]
        if width % heads and not (attention.head_dim and sizes.get(attention.head_dim)):
            said = f"{tower.name}: hidden_size {width} does not divide into {heads} attention heads."
            hint = "The config.json of this checkpoint is not one that transformers can load."
            raise RefusedError(said, hint=hint)


def check_sizes(config: dict[str, Any], family: Family, headers: Mapping[str, TensorHeader], folder: Path) -> None:
    """Raises RefusedError where the numbers of a config, defaults filled in, cannot be: layers that the weights do not have, a
    plan that does not follow from them."""
    check_depth(headers, config, family, folder)
    if (block := compact_block(config)) is not None:
        check_block(block, config, family, find_architecture(config))


def build_compact(
    config: transformers.PretrainedConfig, family: Family, architecture: str, state: Mapping[str, Tensor]
) -> nn.Module:
    """The compact model of `config.comp` around the given weights, which are shared, not copied; it answers as the family is
    described."""
    with no_init_weights():
        model = family.topology.interface(runtime_of(family).compact_class(architecture))(config)
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if name not in state}
    found = model.load_state_dict(state, strict=False, assign=True)
    if wrong := [*found.unexpected_keys, *(set(found.missing_keys) - tied.keys())]:
        raise ValueError(f"weights that are not those of {architecture}: {few(wrong)}")
    for name, source in tied.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, model.get_parameter(source))
    return model.to(next(iter(state.values())).device).eval()  # buffers that no checkpoint holds follow the weights


def config_of(model: nn.Module) -> transformers.PretrainedConfig:
    """The config that a model of transformers carries; for torch it is one of the model's parts."""
    return cast(transformers.PretrainedConfig, model.config)


def untied_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, without those that are others under a second name."""
    state, sources = model.state_dict(), cast(dict[str, str], model.all_tied_weights_keys)
    second = {name for name, source in sources.items() if state[name].data_ptr() == state[source].data_ptr()}
    return {name: tensor for name, tensor in state.items() if name not in second}


def load_processor(folder: Path) -> Any:
    """Image processor and tokenizer of a checkpoint folder, or the one of them that its model needs. Raises RefusedError where
    they are missing, broken, or make what the model cannot take. No code of the folder's own is run."""
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
    check_folder(folder)
    config, family = describe(folder)
    found = any(any(folder.glob(name)) for name in files)
    if family.topology.reads_texts and not found:  # transformers would make up one without words
        raise RefusedError(f"{folder}: no tokenizer files.", hint=f"One of {', '.join(files)} is needed.")
    try:
        with quiet_libraries():
            check_code(folder)
            loader = without_video(getattr(transformers, family.topology.processor_class))
            processor = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            check_processor(processor, config.to_dict(), family, folder)
    except CompError:
        raise
    except ImportError as error:
        message = f"{folder}: the processor needs a package that is missing: {first_line(error)}"
        raise RefusedError(message, hint="Install it with pip, and try again.") from error
    except Exception as error:
        raise RefusedError(
            f"{folder}: the processor does not load: {first_line(error)}",
            hint="The folder needs preprocessor_config.json (or processor_config.json) and the tokenizer files.",
        ) from error
    return processor


def without_video(loader: Any) -> Any:
    """The class of a processor without the part that makes frames of a video, which comp does not ask: it needs torchvision,
    which nothing else here does."""
    made_of = inspect.signature(loader.__init__).parameters.get("video_processor")
    if made_of is None or made_of.default is made_of.empty:  # SmolVLM's cannot be left out
        return loader
    others = [name for name in loader.get_attributes() if name != "video_processor"]
    members = {"get_attributes": classmethod(lambda own: others), "__module__": loader.__module__}
    return type(loader.__name__, (loader,), members)


def save_processor(processor: Any, folder: Path, source: Path | None = None) -> None:
    """Write the files of a processor, without what a tokenizer remembers of the place that it was loaded from. source: where
    that was; what is said there of videos is handed on, see `without_video`."""
    processor.save_pretrained(folder)
    name, whole = "video_preprocessor_config.json", "processor_config.json"
    if source is not None and (source / name).is_file():
        copy_settings(source / name, folder / name)
    if source is not None and (source / whole).is_file() and "video_processor" in (found := read_json(source / whole)):
        settings = read_json(folder / whole) | {"video_processor": found["video_processor"]}
        (folder / whole).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.exists():
        settings = without_places(read_json(path))
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def cut_at(processor: Any, wanted: int) -> int:
    """Tokens of the longest text, at most `wanted`, that the tokenizer of a processor allows."""
    return min(wanted, getattr(getattr(processor, "tokenizer", processor), "model_max_length", wanted))


def check_finite(state: Mapping[str, Tensor], folder: Path) -> None:
    """Raises RefusedError at the first weight that is not a number, with its name and index."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            bad = (~torch.isfinite(tensor)).nonzero()
            if len(bad):
                raise RefusedError(
                    f"{folder}: weight {name} is {tensor[tuple(bad[0])].item()} at index {bad[0].tolist()}.",
                    hint="The checkpoint is broken (a diverged training run?); comp would only spread the damage.",
                )


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What the block `comp` of a compact checkpoint says about its origin."""
    return {key: value for key, value in config.get("comp", {}).items() if key != "towers"}
