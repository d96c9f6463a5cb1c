"""Models from folders: dense ones through transformers, compact ones through the runtime. Nothing is half loaded."""

import json
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from .dual import speaking_as  # noqa: E402
from .errors import DEVICE, REFUSED, USAGE, CompError  # noqa: E402
from .families import Family, find_architecture  # noqa: E402
from .families.base import INPUTS  # noqa: E402
from .modeling_comp import compact_class  # noqa: E402
from .store import read_config, read_json  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1". Exit 5 where the device is not there: never a silent fall-back."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CompError(f"--device {name}: not a device.", code=USAGE, hint="Use auto, cpu, cuda or cuda:0.") from None
    if device.type not in ("cpu", "cuda"):
        raise CompError(f"--device {name}: comp runs on cpu and cuda.", code=USAGE)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "no GPU answers"
        raise CompError(f"--device {name}: {built}.", code=DEVICE, hint="Use --device cpu, or a machine with an NVIDIA GPU.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CompError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s).", code=DEVICE)
    return device


def pick_dtype(name: str | None) -> torch.dtype | None:
    """fp32, bf16, fp16, or None for the checkpoint's own."""
    if name is not None and name not in DTYPES:
        raise CompError(f"--dtype {name}: unknown.", code=USAGE, hint=f"Use one of {', '.join(DTYPES)}.")
    return DTYPES[name] if name else None


@contextmanager
def quiet_libraries():
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

    Exit 4 where weights are missing, left over, of another size than the config says, or not finite.
    """
    config = read_config(folder)
    architecture = find_architecture(config)
    model_class = compact_class(architecture) if "comp" in config else getattr(transformers, architecture)
    options = {"use_safetensors": not _only_pickle(folder) or not allow_pickle, "local_files_only": True}
    try:
        with quiet_libraries():
            model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **options)
    except CompError:
        raise
    except Exception as error:  # transformers raises many kinds for a broken checkpoint; the sentence is what matters
        raise CompError(
            f"{folder}: the checkpoint does not load: {_first_line(error)}",
            code=REFUSED,
            hint="Weights and config.json must belong together. COMP_DEBUG=1 shows the whole story.",
        ) from error
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)}
    if problems:
        said = "; ".join(f"{name.replace('_', ' ')}: {_few(keys)}" for name, keys in problems.items())
        raise CompError(
            f"{folder}: weights and config.json do not agree ({said}).",
            code=REFUSED,
            hint="comp loads nothing by halves: transformers would fill the gaps with random numbers.",
        )
    check_finite(model.state_dict(), folder)
    return speaking_as(model.eval(), family)


def build_compact(
    config: transformers.PretrainedConfig, family: Family, architecture: str, state: Mapping[str, Tensor]
) -> nn.Module:
    """The compact model of `config.comp` around the given weights, which are shared, not copied; it answers as the family is
    described."""
    with no_init_weights():
        model = compact_class(architecture)(config)
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if name not in state}
    found = model.load_state_dict(state, strict=False, assign=True)
    if wrong := [*found.unexpected_keys, *(set(found.missing_keys) - tied.keys())]:
        raise ValueError(f"weights that are not those of {architecture}: {_few(wrong)}")
    for name, source in tied.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, model.get_parameter(source))
    model = speaking_as(model, family)
    return model.to(next(iter(state.values())).device).eval()  # buffers that no checkpoint holds follow the weights


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, without those that are others under a second name."""
    state, sources = model.state_dict(), model.all_tied_weights_keys
    second = {name for name, source in sources.items() if state[name].data_ptr() == state[source].data_ptr()}
    return {name: tensor for name, tensor in state.items() if name not in second}


def load_processor(folder: Path, inputs: tuple[str, ...] = INPUTS) -> Any:
    """Image processor and tokenizer of a checkpoint folder, or the one that makes the `inputs` of a model. Exit 4 where they
    are missing or broken."""
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
    images, texts = "pixel_values" in inputs, "input_ids" in inputs
    if texts and not any(any(folder.glob(name)) for name in files):  # transformers would make up one without words
        raise CompError(f"{folder}: no tokenizer files.", code=REFUSED, hint=f"One of {', '.join(files)} is needed.")
    both, one = transformers.AutoProcessor, transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    try:
        with quiet_libraries():
            return (both if images and texts else one).from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        message = f"{folder}: the processor needs a package that is missing: {_first_line(error)}"
        raise CompError(message, code=REFUSED, hint="Install it with pip, and try again.") from error
    except Exception as error:
        raise CompError(
            f"{folder}: the processor does not load: {_first_line(error)}",
            code=REFUSED,
            hint="The folder needs preprocessor_config.json (or processor_config.json) and the tokenizer files.",
        ) from error


def save_processor(processor: Any, folder: Path) -> None:
    """Write the files of a processor, without what a tokenizer remembers of the place that it was loaded from."""
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.exists():
        settings = {name: value for name, value in read_json(path).items() if name not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def cut_at(processor: Any, wanted: int) -> int:
    """Tokens of the longest text, at most `wanted`, that the tokenizer of a processor allows."""
    return min(wanted, getattr(getattr(processor, "tokenizer", processor), "model_max_length", wanted))


def check_finite(state: Mapping[str, Tensor], folder: Path) -> None:
    """Exit 4 at the first weight that is not a number, with its name and index."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            bad = (~torch.isfinite(tensor)).nonzero()
            if len(bad):
                raise CompError(
                    f"{folder}: weight {name} is {tensor[tuple(bad[0])].item()} at index {bad[0].tolist()}.",
                    code=REFUSED,
                    hint="The checkpoint is broken (a diverged training run?); comp would only spread the damage.",
                )


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What the block `comp` of a compact checkpoint says about its origin."""
    return {key: value for key, value in config.get("comp", {}).items() if key != "towers"}


def _only_pickle(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _few(keys: Any) -> str:
    names = [str(key[0] if isinstance(key, tuple) else key) for key in keys]
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
