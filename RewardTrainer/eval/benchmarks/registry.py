"""The names under which benchmarks are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from RewardTrainer.eval.base import Benchmark

Loader = Callable[[Path | None], Benchmark]

BENCHMARKS: dict[str, Loader] = {}
"""name -> function of --data_dir that loads it."""


def register(name: str) -> Callable[[Loader], Loader]:
    """Make a loader known as `--benchmarks <name>`."""

    def add(loader: Loader) -> Loader:
        BENCHMARKS[name] = loader
        return loader

    return add
