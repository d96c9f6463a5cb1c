"""`comp env`: what is installed, what it finds on this machine, and what would fail. For bug reports, so nothing here needs a
library to be whole: one that is missing or broken is a finding."""

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CompError
from ..files import cores
from ..report.environment import EnvironmentReport
from ..report.numbers import mib

DISTRIBUTION = "comp-cli"
VARIABLES = (
    "HF_HOME HF_HUB_CACHE HF_ENDPOINT HF_HUB_OFFLINE HF_TOKEN CUDA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS "
    "PYTORCH_CUDA_ALLOC_CONF TMPDIR PYTHONPATH COMP_DEBUG"
).split()
SECRETS = {"HF_TOKEN"}
EXTRAS = {"plot": "bench --plot", "caption": "CIDEr of captions"}  # and what they are for
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # two wheels of one module, either of which will do
COMPILERS = ("c++", "g++", "clang++")
LITTLE_SPACE = 2 * 2**30  # bytes in the cache of downloads: a full-size model with its pickled twin is about as large

Problem = dict[str, str]  # what would fail, and why
Reader = Callable[[], tuple[Any, list[Problem]]]


def environment() -> EnvironmentReport:
    """It never fails: what does not work is among its problems."""
    readers: tuple[tuple[Reader, Any], ...] = (
        (read_packages, {}),
        (read_tested, None),
        (read_devices, []),
        (read_providers, []),
        (read_cache, {}),
    )
    (packages, _, devices, providers, cache), found = zip(*(look(*reader) for reader in readers), strict=True)
    return EnvironmentReport(
        comp_version=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        packages=packages,
        devices=devices,
        providers=providers,
        cache=cache,
        variables={name: _told(name) for name in VARIABLES if os.environ.get(name)},
        problems=[problem for part in found for problem in part],
    )


def look(read: Reader, nothing: Any) -> tuple[Any, list[Problem]]:
    """What a reader found, with its problems; `nothing` where it stumbles: half an installation fails in its own ways."""
    try:
        return read()
    except Exception as error:
        return nothing, [{"what": "unknown", "why": f"{read.__name__.replace('_', ' ')} failed: {_sentence(error)}"}]


def read_packages() -> tuple[dict[str, str | None], list[Problem]]:
    """Version of every package that comp asks for, None where it is missing, and those that are missing, too old or doubled."""
    from packaging.requirements import Requirement

    versions: dict[str, str | None] = {}
    problems = []
    try:
        wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return {}, [{"what": "comp", "why": f"the package {DISTRIBUTION} is not installed: this is a bare source folder"}]
    for requirement in wanted:
        uses = [extra for extra in ("", *EXTRAS) if requirement.marker is None or requirement.marker.evaluate({"extra": extra})]
        if requirement.name in RUNTIMES and _version(requirement.name) is None and any(map(_version, RUNTIMES)):
            continue  # the other one is there
        if not uses or requirement.name == DISTRIBUTION:  # not for this machine, or for developers; an extra that names others
            continue
        version = versions[requirement.name] = _version(requirement.name)
        what = EXTRAS.get(uses[0], "everything")
        if version is None:
            problems.append({"what": what, "why": f"{requirement.name} is not installed"})
        elif not _fits(requirement, version):
            problems.append(
                {"what": what, "why": f"{requirement.name} {version} is installed, needed is {requirement.specifier}"}
            )
    versions |= {name: version for name in RUNTIMES if (version := _version(name))}
    return versions, problems


def both_runtimes(providers: list[str]) -> list[Problem]:
    """What is wrong with two wheels of ONNX Runtime in one folder, by the providers that the one has which came last."""
    installed = [f"{name} {version}" for name in RUNTIMES if (version := _version(name))]
    if len(installed) < 2 or "CUDAExecutionProvider" in providers:
        return []
    why = f"{' and '.join(installed)} share one folder, and the one without CUDA came last"
    return [{"what": "graphs on --device cuda", "why": f"{why}: pip install --force-reinstall --no-deps onnxruntime-gpu"}]


def read_tested() -> tuple[None, list[Problem]]:
    """Whether transformers is of a release that the runtime of compact models was tested with."""
    transformers, missing = _import("transformers")
    if transformers is None:
        return None, missing
    runtime, missing = _import("comp_cli.runtime.modeling_comp")
    if runtime is None:
        return None, missing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runtime.warn_if_untested.__wrapped__()
    return None, [{"what": "compact models, perhaps", "why": str(warning.message)} for warning in caught]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Any, version: str) -> bool:
    """False also for a version that is none."""
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except ValueError:
        return False


def read_devices() -> tuple[list[dict[str, Any]], list[Problem]]:
    """The CPU, and the GPUs that torch sees."""
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": processor_name(), "cores": os.cpu_count()}]
    devices[0]["usable_cores"], devices[0]["because"] = cores.available()
    psutil, problems = _import("psutil")
    if psutil is not None:
        from ..files import memory

        devices[0] |= {"memory_bytes": psutil.virtual_memory().total, "usable_memory_bytes": memory.allowed()}
    torch, missing = _import("torch")
    if torch is None:
        return devices, [*problems, *missing]
    devices[0]["threads"] = torch.get_num_threads()
    if not any(map(shutil.which, COMPILERS)):
        problems.append({"what": "bench --backend compile", "why": f"no C++ compiler on PATH ({' or '.join(COMPILERS)})"})
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
        return devices, [*problems, {"what": "--device cuda", "why": why}]
    if not torch.cuda.is_available():
        why = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
        return devices, [*problems, {"what": "--device cuda", "why": why}]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": gpu.name, "memory_bytes": gpu.total_memory})
    return devices, problems


def read_providers() -> tuple[list[str], list[Problem]]:
    """The providers that ONNX Runtime says it has, and whether that for CUDA loads."""
    onnxruntime, missing = _import("onnxruntime")
    if onnxruntime is None:
        return [], missing
    providers = list(onnxruntime.get_available_providers())
    if both := both_runtimes(providers):
        return providers, both
    why = None
    try:
        from ..onnx import profiling

        profiling.check_cuda()
    except CompError as error:
        why = f"{error.message} {error.hint}"
    except Exception as error:
        why = _sentence(error)
    problems = [{"what": "graphs on --device cuda", "why": why}] if why else []
    return providers, problems


def read_cache() -> tuple[dict[str, Any], list[Problem]]:
    """Where downloads go, and how much room there is."""
    hub, missing = _import("huggingface_hub")
    if hub is None:
        return {}, missing
    place = Path(hub.constants.HF_HUB_CACHE)
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    problems = []
    if not there.is_dir():
        problems.append({"what": "downloads", "why": f"{there} is no folder; --cache-dir names another place"})
    elif not os.access(there, os.W_OK):
        problems.append({"what": "downloads", "why": f"{there} cannot be written; --cache-dir names another place"})
    elif free < LITTLE_SPACE:
        problems.append({"what": "downloads", "why": f"{mib(free)} are free at {there}; --cache-dir names another disk"})
    return {"path": str(place), "free_bytes": free}, problems


def _import(name: str) -> tuple[Any, list[Problem]]:
    """A module, or None and why it cannot be had: a broken one raises nearly anything."""
    try:
        return import_module(name), []
    except Exception as error:
        return None, [{"what": "everything", "why": f"{name} cannot be imported: {_sentence(error)}"}]


def _told(name: str) -> str:
    """An environment variable, without what is nobody's business: tokens, and names and passwords in addresses."""
    return "(set)" if name in SECRETS else re.sub("//[^/@]*@", "//(set)@", os.environ[name])


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def processor_name() -> str:
    """The CPU's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
