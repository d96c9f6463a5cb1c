"""The report of `comp env`, and its lines."""

from dataclasses import dataclass
from typing import Any

from .base import Report
from .numbers import Printer, mib


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport(Report):
    """What is installed, what it finds on this machine, and what would fail.

    Attributes:
        comp_version: version of comp.
        python: version of Python.
        executable: path of Python.
        platform: operating system and machine.
        packages: version of every package that comp asks for; None where it is missing.
        devices: the CPU, and the GPUs that torch sees.
        providers: execution providers of ONNX Runtime.
        cache: where downloads go, and how much room there is.
        variables: environment variables that matter, without secrets.
        problems: what would fail, and why.
    """

    comp_version: str
    python: str
    executable: str
    platform: str
    packages: dict[str, str | None]
    devices: list[dict[str, Any]]
    providers: list[str]
    cache: dict[str, Any]
    variables: dict[str, str]
    problems: list[dict[str, str]]


def print_environment(report: EnvironmentReport, out: Printer) -> None:
    """Plain lines, to be pasted into a bug report."""
    lines: dict[str, str | None] = {"comp": report.comp_version, "Python": f"{report.python} ({report.executable})"}
    lines |= {"platform": report.platform} | report.packages
    for device in report.devices:
        lines[device["device"]] = ", ".join([device["name"], *_sizes(device)])
    lines["ONNX Runtime"] = ", ".join(report.providers) or None
    if report.cache:
        lines["downloads"] = f"{report.cache['path']}, {mib(report.cache['free_bytes'])} free"
    lines |= report.variables
    for name, value in lines.items():
        out.line(f"{name}: {value or 'not installed'}")
    out.line("\nWhat would fail here:" if report.problems else "\nNothing that was looked at would fail here.")
    for problem in report.problems:
        out.line(f"- {problem['what']}: {problem['why']}")


def _sizes(device: dict[str, Any]) -> list[str]:
    """Of a CPU: cores and memory, and what of them this process may use; of a GPU its memory."""
    memory = [mib(device["memory_bytes"])] if "memory_bytes" in device else []
    if "cores" not in device:
        return memory
    said = [f"{device['cores']} cores, {device['usable_cores']} usable ({device['because']})"]
    said += [f"PyTorch threads: {device['threads']}"] if "threads" in device else []
    return said + [f"{size}, {mib(device['usable_memory_bytes'])} usable" for size in memory]
