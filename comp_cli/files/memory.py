"""What of the machine's memory this process may use, and what it has used."""

import ctypes
import resource
import sys
from pathlib import Path

M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 1 << 20  # of glibc's mallopt; bytes


def allowed() -> int | None:
    """Bytes that this process may still take: what the limit on its address space (`ulimit -v`), that of its control group, and
    free memory leave, whichever is least. None where none of them is known."""
    found = [room for room in (_address_space(), _control_group(), _free()) if room is not None]
    return min(found, default=None)


def _address_space() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        taken = peak()
    return max(limit - taken, 0)


def _control_group() -> int | None:
    for limit, taken in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            said = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            held = int((Path("/sys/fs/cgroup") / taken).read_text())
        except OSError:
            continue
        if said.isdigit() and int(said) < 1 << 60:  # above: no limit, as old kernels say it
            return max(int(said) - held, 0)
    return None


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def peak() -> int:
    """Bytes that were resident at most in this process."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def give_back_large_blocks() -> None:
    """Let the allocator return what is freed to the system: glibc keeps blocks of the sizes that it has seen freed, and layer
    after layer adds up. Of other allocators nothing is asked."""
    try:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    except (OSError, AttributeError):
        pass
