"""What does the teacher think of tokens that are already there? vLLM in process, asked for prompt log-probabilities.

What the obvious way gets wrong:
1. `prompt_logprobs` as dictionaries cost 20 times the forward pass (an object for each of 65 candidates a token);
   `flat_logprobs` without detokenization is three lists.
2. vLLM computes the logits of a whole prefill chunk at once, in full precision, outside of the memory it measured when
   it started: 16,384 tokens of a vocabulary of 152,000 are 10 GB. On a GPU the chunk is therefore kept small.
3. A request has to generate: one token, which is thrown away, and which needs its place in the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from distiller.engine import Ask, AskError, Completion, Sampling
from distiller.logprob_cache import TokenLogprobs
from distiller.vllm_engine import VLLMEngine
from distiller.vllm_setup import is_cpu_build

CHUNK_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class ResponseAsk(Ask):
    """An ask for the log-probabilities of a response; `messages` (with the response) only say what it is."""

    prompt_ids: list[int]
    """The teacher's prompt, up to where its answer begins."""
    response_ids: list[int]
    """The tokens whose log-probabilities are wanted, the end of turn included."""


@dataclass(frozen=True, kw_only=True)
class ResponseRead(Completion):
    """The answer to a `ResponseAsk`; it has no text."""

    tokens: TokenLogprobs


class VLLMLogprobEngine(VLLMEngine):
    """A teacher engine whose asks are `ResponseAsk`s and whose answers are `ResponseRead`s (or AskErrors).

    top_k: candidates a position, at most the model's vocabulary. Other arguments: `VLLMEngine`.
    """

    def __init__(self, model: str, top_k: int, *, max_num_seqs: int | None = None, **arguments) -> None:
        self.top_k = top_k
        more = {"max_logprobs": top_k, "logprobs_mode": "raw_logprobs"}
        if not is_cpu_build():
            more["max_num_batched_tokens"] = max(CHUNK_TOKENS, max_num_seqs or 0)  # vLLM wants one for each sequence
        one_token = Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=1)
        super().__init__(model, one_token, max_num_seqs=max_num_seqs, engine_arguments=more, **arguments)

    def submit(self, key: int, ask: ResponseAsk) -> None:
        """Queue one ask; one that cannot be asked comes back from `collect` as an AskError. Raises EngineDead."""
        tokens = [*ask.prompt_ids, *ask.response_ids]
        if len(tokens) >= self.max_model_len:
            self._refused.append((key, self._too_long(ask)))
            return
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=self.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._queue(key, tokens, parameters, partial(self._read, ask=ask))

    def _too_long(self, ask: ResponseAsk) -> AskError:
        return AskError(
            f"the prompt has {len(ask.prompt_ids)} tokens and the response {len(ask.response_ids)}; together they "
            f"must be under max_model_len {self.max_model_len}. Raise --max_model_len and give --retry_failed"
        )

    def _read(self, output, ask: ResponseAsk) -> ResponseRead | AskError:
        """vLLM's flat lists, (positions - 1) * (1 + k) long, as ours; there is no distribution before the first
        token."""
        flat, count = output.prompt_logprobs, len(ask.response_ids)
        shape = (len(output.prompt_token_ids) - 1, 1 + self.top_k)
        # position t: the token itself, then the k most likely ones, it among them where it ranks so high
        ids = np.array(flat.token_ids, dtype=np.int32).reshape(shape)[-count:]  # (n, 1 + k)
        logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(shape)[-count:]  # (n, 1 + k)
        if np.isnan(logprobs).any():
            return AskError("the teacher's log-probabilities are not numbers (NaN): try another --dtype")
        return ResponseRead(
            text="",
            reasoning=None,
            finish_reason="stop",
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=1,
            choice_logprobs=None,
            tokens=TokenLogprobs.measured(ask.prompt_ids, ids[:, 0], logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]),
        )
