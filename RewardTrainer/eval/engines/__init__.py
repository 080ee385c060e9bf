"""Engines by name: `hf` (transformers), `vllm` (pooling), or an adapter of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.engines.base import Engine

ENGINES = ("hf", "vllm")


def load_engine(
    model: str,
    engine: str = "hf",
    *,
    adapter: str | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
) -> Engine:
    """The engine asked for, its model loaded. Imports only what that engine needs; says which arguments it has no use
    for.

    Raises:
        InputError: an unknown engine, or a model that cannot be loaded or is no reward model
    """
    given = {  # None: as it is by default
        "--dtype": dtype if dtype != "auto" else None,
        "--engine": engine if engine != "hf" else None,
        "--max_length": max_length,
        "--attn_implementation": attn_implementation,
        "--tokens_per_batch": tokens_per_batch,
        "--trust_remote_code": trust_remote_code or None,
        "--tensor_parallel_size": tensor_parallel_size if tensor_parallel_size != 1 else None,
        "--gpu_memory_utilization": gpu_memory_utilization if gpu_memory_utilization != 0.9 else None,
    }
    of_others = {
        "hf": ("--tensor_parallel_size", "--gpu_memory_utilization"),
        "vllm": ("--attn_implementation", "--tokens_per_batch"),
    }
    useless = given if adapter is not None else of_others.get(engine, ())
    unused = [name for name in useless if given[name] is not None]
    if unused:
        who = f"--engine {engine}" if adapter is None else "the adapter"
        print(f"note: {who} has no use for {', '.join(unused)}", file=sys.stderr)
    if adapter is not None:
        import torch

        from RewardTrainer.eval.engines.adapter import AdapterScorer

        return AdapterScorer(Path(adapter), model, "cuda" if torch.cuda.is_available() else "cpu")
    if engine == "hf":
        from RewardTrainer.eval.engines.hf import load_scorer

        return load_scorer(model, dtype, max_length, tokens_per_batch, attn_implementation, trust_remote_code)
    if engine == "vllm":
        from RewardTrainer.eval.engines.vllm import load_vllm_scorer

        return load_vllm_scorer(
            model, dtype, max_length, trust_remote_code, tensor_parallel_size, gpu_memory_utilization
        )
    raise InputError(f"--engine {engine}: not one of {', '.join(ENGINES)}")
