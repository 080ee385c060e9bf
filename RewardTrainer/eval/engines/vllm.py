"""Rewards from vLLM's pooling runner, for models that it serves: fast on GPUs, prefix caching included.

Conversations go in as the token ids that the Hugging Face engine would see (template, BOS and truncation are
`encoding.py`'s), so that the two engines differ by rounding alone. What would go wrong otherwise:

1. vLLM puts a sigmoid on the score of a one-label model whose config does not say `"problem_type": "regression"`, as
   most reward models' do not. It is switched off for every request.
2. A model with code of its own (our `--head mlp`) is pooled at its first token by default, which gives every
   conversation the same reward. It is told to take the last.
3. A tokenizer or a config with two labels, pickled weights: refused before loading, as for the other engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from distiller.engine import EngineNotStarted
from distiller.records import InputError
from distiller.vllm_setup import cpu_threads, is_cpu_build, prepare_cpu
from RewardTrainer.eval.engines.base import Encoded

AT_ONCE = 512
"""Conversations handed over at a time: what is finished is on disk, and a kill costs no more than these."""


def load_vllm_scorer(
    name: str,
    dtype: str = "auto",
    max_length: int | None = None,
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
) -> VLLMScorer:
    """Load a reward model into vLLM, in this process.

    Args:
        name, dtype, max_length, trust_remote_code: see `hf.load_scorer`
        tensor_parallel_size: GPUs it is spread over
        gpu_memory_utilization: share of the GPU's memory to take

    Raises:
        InputError: it cannot be loaded, or is no one-label sequence-classification model
    """
    try:
        cpu = is_cpu_build()
    except EngineNotStarted as fault:
        raise InputError("vLLM is not installed: run `make env`, or take --engine hf") from fault
    if cpu:
        prepare_cpu(cpu_threads(name))  # before torch is imported
    from RewardTrainer.eval.engines.encoding import ChatEncoder, resolve_max_length
    from RewardTrainer.eval.engines.loading import load_config, resolve_dtype

    dtype = resolve_dtype(dtype, on_gpu=not cpu)
    config, tokenizer = load_config(name, trust_remote_code)
    encoder = ChatEncoder(tokenizer, resolve_max_length(config, tokenizer, max_length))
    arguments = {
        "model": name,
        "runner": "pooling",
        "convert": "classify",
        "dtype": dtype,
        "max_model_len": encoder.max_length,
        "trust_remote_code": trust_remote_code,
        "tensor_parallel_size": tensor_parallel_size,
        "load_format": "safetensors",
    }
    if cpu:
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "use_tqdm_on_load": False}
    else:
        arguments["gpu_memory_utilization"] = gpu_memory_utilization

    from vllm import LLM
    from vllm.config import PoolerConfig

    if "auto_map" in config.to_dict():
        arguments["pooler_config"] = PoolerConfig(seq_pooling_type="LAST")
    try:
        llm = LLM(**arguments)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise InputError(f"{name}: vLLM cannot load it: {error}\nTry --engine hf.") from error
    return VLLMScorer(encoder, llm)


class VLLMScorer:
    """A reward model in vLLM; an `Engine`."""

    def __init__(self, encoder, llm) -> None:
        self.encode = encoder.encode
        self.max_length = encoder.max_length
        self.llm = llm

    def score(self, rows: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, int, float]]:
        """See `Engine.score`. Rows stay together, so that the cache has the prompt their conversations share."""
        from vllm import PoolingParams

        raw = PoolingParams(use_activation=False)
        waiting = [(row, n, ids.ids) for row, conversations in enumerate(rows) for n, ids in enumerate(conversations)]
        for start in range(0, len(waiting), AT_ONCE):
            part = waiting[start : start + AT_ONCE]
            prompts = [{"prompt_token_ids": list(ids)} for _, _, ids in part]
            outputs = self.llm.classify(prompts, pooling_params=raw, use_tqdm=False)
            for (row, number, _), output in zip(part, outputs, strict=True):
                (reward,) = output.outputs.probs
                if not math.isfinite(reward):
                    raise InputError("a reward is not finite; try --dtype float32 or bfloat16")
                yield row, number, reward
