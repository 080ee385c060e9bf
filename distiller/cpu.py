"""Cores that this process may use, and those of them that are idle."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores of this process's affinity, at most the container's share, of which the affinity knows nothing."""
    cores = len(_affinity())
    with suppress(OSError, ValueError):
        microseconds, period = QUOTA.read_text().split()
        cores = min(cores, max(1, int(microseconds) // int(period)))
    return cores


def idle_cores(seconds: float = 0.5) -> int:
    """As many of them as nothing else used in the next so many seconds; at least 1."""
    import psutil  # DeepSpeed's own dependency

    busy = dict(enumerate(psutil.cpu_percent(seconds, percpu=True)))
    idle = sum(1 - busy.get(core, 0.0) / 100 for core in _affinity())
    return max(1, min(round(idle), usable_cores()))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
