"""Benchmarks by name.

A benchmark is one file here: a function `load(data_dir) -> Benchmark` under `@register(name)`, its rows and its metric
(see `RewardTrainer/eval/base.py`, and `ifbench.py` for a short one). Every module of this package is imported, so
adding a benchmark is adding its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark
from RewardTrainer.eval.benchmarks.registry import BENCHMARKS, register

__all__ = ["BENCHMARKS", "load_benchmark", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def load_benchmark(name: str, data_dir: Path | None) -> Benchmark:
    """A benchmark by name, or a preference file by path.

    Raises:
        InputError: neither a known name nor a file, or its data cannot be read
    """
    from RewardTrainer.eval.benchmarks import preference

    if name in BENCHMARKS:
        return BENCHMARKS[name](data_dir)
    if Path(name).is_file():
        return preference.load(Path(name))
    known = ", ".join(sorted(BENCHMARKS))
    raise InputError(f"--benchmarks {name}: neither a benchmark ({known}) nor a preference file that exists")
