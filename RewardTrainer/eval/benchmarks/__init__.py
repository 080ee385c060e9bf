"""Benchmarks by name.

A benchmark is one file here: a function `load(data_dir) -> Benchmark` under `@register(name)`, its rows and its metric
(see `RewardTrainer/eval/base.py`, and `ifbench.py` for a short one). Every module of this package is imported, so
adding a benchmark is adding its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark
from RewardTrainer.eval.benchmarks.registry import BENCHMARKS, register

__all__ = ["BENCHMARKS", "load_benchmark", "load_benchmarks", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def load_benchmarks(names: str, data_dir: Path | None) -> list[Benchmark]:
    """What `--benchmarks` and `--data_dir` name: comma-separated benchmarks and preference data, each once.

    Raises:
        InputError: nothing named or something twice, no such directory, or as `load_benchmark`
    """
    named = [name.strip() for name in names.split(",") if name.strip()]
    if not named or len({name if name in BENCHMARKS else Path(name).resolve() for name in named}) < len(named):
        raise InputError(f"--benchmarks {names}: one or more different names expected")
    if data_dir is not None and not data_dir.is_dir() and any(name in BENCHMARKS for name in named):
        raise InputError(f"--data_dir {data_dir}: no such directory; make it, empty where all is on the hub")
    return [load_benchmark(name, data_dir) for name in named]


def load_benchmark(name: str, data_dir: Path | None) -> Benchmark:
    """A benchmark by name, or preference data by path or as a dataset of the hub (`owner/name:config:split`).

    Raises:
        InputError: neither a known name nor a source of rows, or its data cannot be read
    """
    from RewardTrainer.eval.benchmarks import preference

    if name in BENCHMARKS:
        return BENCHMARKS[name](data_dir)
    if Path(name).exists() or "/" in name or ":" in name:  # what has neither is a mistyped name, and no dataset
        return preference.load(name)
    close = get_close_matches(name, BENCHMARKS, 1)
    meant = f"; did you mean {close[0]}?" if close else f": {', '.join(sorted(BENCHMARKS))}"
    raise InputError(f"--benchmarks {name}: no file in {Path.cwd()}, and none of the benchmarks{meant}")
