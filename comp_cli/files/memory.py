"""What of the memory of the machine and of its GPUs this process may use, and what it has used."""

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 1 << 17  # of glibc's mallopt; bytes, with which it begins


def allowed() -> int:
    """Bytes that this process may still take: what the limit on its address space (`ulimit -v`), that of its control group, and
    free memory leave, whichever is least."""
    return min(room for room in (_address_space(), _control_group(), _free()) if room is not None)


def _address_space() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(limit - psutil.Process().memory_info().vms, 0)


def _control_group() -> int | None:
    """Of the group of this process and of all around it, as systemd and containers set them (cgroup 2)."""
    try:
        own = next(line for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    group, found = CGROUPS / own.removeprefix("0::").strip("/"), []
    for place in (group, *group.parents):
        if place.is_relative_to(CGROUPS) and (room := _room_of(place)) is not None:
            found.append(room)
    return min(found, default=None)


def _room_of(group: Path) -> int | None:
    """What the limit of a group leaves; None where it has none. Files that are cached count as free."""
    try:
        limit, taken = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cached = sum(int(number) for name, number in lines if name in ("active_file", "inactive_file"))
    return max(int(limit) - taken + cached, 0) if limit.isdigit() else None


def _free() -> int:
    return psutil.virtual_memory().available


def allowed_on(device: "torch.device") -> int:
    """Bytes that this process may still take where a device has its memory: of a GPU what the driver has left, and what torch
    holds there and does not use."""
    if device.type != "cuda":
        return allowed()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def resident() -> int:
    """Bytes of this process that are resident now."""
    return psutil.Process().memory_info().rss


def peak() -> int:
    """Bytes that were resident at most in this process. Linux: VmHWM, which starts anew with the process, where ru_maxrss would
    remember the size of its parent."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    if known := [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]:
        return known[0]
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def peak_on(device: "torch.device") -> int:
    """Bytes that were taken at most where a device has its memory, see `peak`; of a GPU by tensors, since `forget_peak_on`."""
    if device.type != "cuda":
        return peak()
    import torch

    return torch.cuda.max_memory_allocated(device)


def forget_peak_on(device: "torch.device") -> None:
    """Begin anew with the peak of a GPU; that of the machine's memory is of the whole process."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def give_back_large_blocks() -> None:
    """Let the allocator return what is freed to the system: glibc keeps blocks of the sizes that it has seen freed, and layer
    after layer adds up. Of other allocators nothing is asked."""
    try:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    except (OSError, AttributeError):
        pass
