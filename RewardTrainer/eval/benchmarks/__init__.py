"""Benchmarks by name.

A benchmark is one file with `load(data_dir) -> Benchmark` (see `base.py`) and its line in `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.benchmarks import example, preference
from RewardTrainer.eval.benchmarks.base import Benchmark, Item

__all__ = ["BENCHMARKS", "Benchmark", "Item", "load_benchmark"]

BENCHMARKS: dict[str, Callable[[Path | None], Benchmark]] = {
    "example": example.load,
}


def load_benchmark(name: str, data_dir: Path | None) -> Benchmark:
    """A benchmark by name, or a preference file by path.

    Raises:
        InputError: neither a known name nor a file, or its data cannot be read
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name](data_dir)
    if Path(name).is_file():
        return preference.load(Path(name))
    known = ", ".join(BENCHMARKS)
    raise InputError(f"--benchmarks {name}: neither a benchmark ({known}) nor a preference file that exists")
