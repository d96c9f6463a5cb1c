"""How many cores this process really has: containers and batch systems give less than the machine shows."""

import os
from pathlib import Path
from typing import NamedTuple

CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
PERIOD = 100_000  # microseconds, where a group names none


class Cores(NamedTuple):
    """A number of cores, at least 1, and what it comes from: "cores" (of the machine), "affinity" or "quota"."""

    number: int
    because: str


def available() -> Cores:
    """What the machine, the affinity of this process and the quotas of its control groups leave, whichever is least. Parts of a
    core are left out: a thread too many makes all wait for the rest of every period."""
    found = Cores(os.cpu_count() or 1, "cores")
    if hasattr(os, "sched_getaffinity") and (own := len(os.sched_getaffinity(0))) < found.number:
        found = Cores(own, "affinity")
    given = quota()
    if given is not None and (whole := max(1, int(given))) < found.number:
        found = Cores(whole, "quota")
    return found


def quota() -> float | None:
    """Cores that the control groups of this process, and all around them, give it: the least of `cpu.max` (cgroup 2) and of
    `cpu.cfs_quota_us` (cgroup 1). None where none sets a limit."""
    found = []
    for mount, own in _mounts():
        group = mount / own.strip("/")  # of another namespace where it is not there; then what is around it counts
        for place in (group, *group.parents):
            if place.is_relative_to(mount) and (cores := _quota_of(place)) is not None:
                found.append(cores)
    return min(found, default=None)


def _mounts() -> list[tuple[Path, str]]:
    """Where groups that limit cores may lie, and the name of this process's group there."""
    try:
        lines = [line.split(":", 2) for line in OWN_GROUP.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, own in (line for line in lines if len(line) == 3):
        if not controllers:
            found += [(CGROUPS, own), (CGROUPS / "unified", own)]
        elif "cpu" in controllers.split(","):
            found += [(CGROUPS / name, own) for name in dict.fromkeys((controllers, "cpu", "cpu,cpuacct"))]
    return found


def _quota_of(group: Path) -> float | None:
    """Cores that one group gives, None where it gives all."""
    words = _read(group / "cpu.max").split() or [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    try:
        given, period = int(words[0]), int(words[1]) if len(words) > 1 and words[1] else PERIOD
    except ValueError:  # "max", or no such file
        return None
    return given / period if given > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
