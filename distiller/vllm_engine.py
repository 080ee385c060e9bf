"""The default teacher: vLLM in this process, one code path for GPU and CPU.

A rolling window: `submit` queues a request, `collect` steps the engine until something has finished. Against one big
`llm.chat(...)` call this costs nothing measurable, and every row can be written the moment it is done.

What the obvious way gets wrong, and this file therefore does itself:
1. One over-long prompt makes `llm.chat` raise for the whole batch, and `max_tokens` is clipped in silence where it
   does not fit. Here the prompt is rendered and counted first, and the ask that does not fit comes back alone, as an
   AskError.
2. A killed engine process (out of memory) leaves `llm.chat` waiting for ever. Here the process is watched.
3. On CPU the defaults either crash (a seeded request whose prefill is split) or are many times slower (OpenMP threads
   that wait for each other on a busy machine). `prepare_cpu` and the CPU arguments in `VLLMEngine` are the settings
   that work.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path

from distiller.chat import ThinkingMarks, check_messages, thinking_marks
from distiller.engine import Ask, AskError, Choices, Completion, EngineDead, EngineNotStarted, Sampling
from distiller.tokens import with_fixed_date
from distiller.vllm_choices import Weighing
from distiller.vllm_setup import (
    check_weights,
    cpu_dtype,
    cpu_threads,
    is_cpu_build,
    long_rope,
    prepare_cpu,
    vllm_version,
)

WATCH_SECONDS = 2.0  # how often a running step looks whether the engine process is alive
COUNTERS = ("vllm:generation_tokens", "vllm:prompt_tokens")
QUEUED_AHEAD = 1.25  # asks in flight for each sequence vLLM runs at once, so that a freed slot never waits for us
Read = Callable[[object], Completion | AskError | None]
"""What vLLM's RequestOutput says; None while other requests of the same ask are still on their way."""


class VLLMEngine:
    """A `TeacherEngine` on vLLM in process.

    model: local directory or hub name. max_model_len: context in tokens, None for the model's own. dtype: "auto" is
    the model's own on a GPU and `cpu_dtype` on a CPU. chat_template_kwargs: passed to the chat template, which ignores
    names it does not know (`{"enable_thinking": False}`). max_num_seqs: sequences decoded at once, None: vLLM's own.
    thinking_tags: names of tags around its thinking, beside the usual ones. engine_arguments: more for `vllm.LLM`.
    Raises EngineNotStarted where the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        *,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        chat_template_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        max_num_seqs: int | None = None,
        thinking_tags: Sequence[str] = (),
        engine_arguments: dict | None = None,
    ) -> None:
        check_weights(model)
        if max_model_len is not None and sampling.max_tokens >= max_model_len:
            raise EngineNotStarted(
                f"max_tokens {sampling.max_tokens} leaves no room for a prompt in max_model_len {max_model_len}: "
                "lower --max_tokens or raise --max_model_len"
            )
        self.sampling = sampling
        self._marks = thinking_marks(tuple(thinking_tags))
        self.template_kwargs = dict(chat_template_kwargs or {})
        arguments = {
            "model": str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "dtype": dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "trust_remote_code": trust_remote_code,
            "max_num_seqs": max_num_seqs,
            "load_format": "safetensors",
            "enable_prefix_caching": True,
            "disable_log_stats": False,  # for `tokens`
        }
        if is_cpu_build():
            prepare_cpu(cpu_threads(model))
            # Without chunked prefill vLLM itself raises max_num_batched_tokens to max_model_len: no prefill is split.
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "use_tqdm_on_load": False}
            arguments["dtype"] = cpu_dtype(model) if dtype == "auto" else dtype
            # On CPU that would be a share of the whole RAM; VLLM_CPU_KVCACHE_SPACE says it in GiB.
            arguments.pop("gpu_memory_utilization")
        arguments |= engine_arguments or {}
        self.tokenizer = self._load_tokenizer(arguments["model"], trust_remote_code)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})  # not every tokenizer of transformers has it
        special = [str(token) for token in added.values() if token.special]
        self._marks_are_special = any(map(self._marks.uses, special))  # and vLLM would leave them out of the text
        children = set(multiprocessing.active_children())
        try:
            self.llm = self._load(arguments)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise EngineNotStarted(
                f"vLLM could not load {model!r}: {error}\nWeights must be safetensors. If memory is short, lower "
                "--max_model_len or raise --tensor_parallel_size; on CPU VLLM_CPU_KVCACHE_SPACE is the cache in GiB"
            ) from error
        self.processes = [child for child in multiprocessing.active_children() if child not in children]
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.capacity = int(self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs * QUEUED_AHEAD)
        # request id -> (the runner's key, what reads its output)
        self._keys: dict[str, tuple[int, Read]] = {}
        self._refused: list[tuple[int, AskError]] = []
        self._serial = 0
        self._facts = {
            "engine": "vllm",
            "model": model,
            "dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "chat_template_kwargs": self.template_kwargs,
            "vllm": vllm_version(),
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
        }
        rope = long_rope(self.llm.llm_engine.model_config.hf_text_config.to_dict(), self.max_model_len)
        if rope:
            self._facts["rope"] = rope
        if is_cpu_build():
            threads = f"OMP_NUM_THREADS {os.environ['OMP_NUM_THREADS']}"
            print(f"vLLM runs on the CPU, in {self._facts['dtype']}, {threads}", file=sys.stderr)
        self._stepper = _Stepper(self.llm.llm_engine.step) if self.processes else None

    @staticmethod
    def _load_tokenizer(model: str, trust_remote_code: bool):
        """The model's tokenizer, loaded before the weights: a missing chat template must not cost their minutes."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            with_fixed_date(tokenizer).get_chat_template()
        except (ValueError, OSError) as error:
            raise EngineNotStarted(f"teacher model {model!r}: no tokenizer with a chat template: {error}") from error
        return tokenizer

    @staticmethod
    def _load(arguments: dict):
        from vllm import LLM

        return LLM(**arguments)

    def _render(self, messages: list[dict]) -> tuple[list[int], str]:
        """Token ids of the rendered conversation, and the mark of thinking that its end opens, if any.

        Raises AskError for a conversation that the template refuses (roles that do not alternate, say) or leaves a
        system message out of.
        """
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except TemplateError as error:
            raise AskError(
                f"the chat template refuses the conversation: {error}. A system message can go into the first user "
                "message instead"
            ) from error
        lost = [m for m in messages if m["role"] == "system" and m["content"].strip() not in text]
        if lost:
            raise AskError(
                "the chat template leaves the system message out: put it into the first user message instead"
            )
        # The template writes BOS itself where the model wants one: adding special tokens again would double it.
        return self.tokenizer.encode(text, add_special_tokens=False), self._marks.opens(text)

    def submit(self, key: int, ask: Ask) -> None:
        """Queue one ask; one that cannot be asked comes back from `collect` as an AskError. Raises EngineDead."""
        try:
            check_messages(ask.messages)
            prompt, opened = self._render(ask.messages)
            if ask.choices:
                self._weigh(key, prompt, ask.choices)
                return
            sampling = ask.sampling or self.sampling
            self._check_length(len(prompt), sampling.max_tokens)
        except AskError as refusal:
            self._refused.append((key, refusal))
            return
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            max_tokens=sampling.max_tokens,
            seed=ask.seed,
            skip_special_tokens=not self._marks_are_special,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._queue(
            key, prompt, parameters, partial(_completion, marks=self._marks, opened=opened, messages=ask.messages)
        )

    def _weigh(self, key: int, prompt: list[int], choices: Choices) -> None:
        """Queue the requests behind an ask with choices. Raises AskError."""
        weighing = Weighing(choices, prompt, self._tokenize)
        self._check_length(max(map(len, weighing.prompts.values())), 1)
        for node, tokens in weighing.prompts.items():
            self._queue(key, tokens, weighing.parameters(node), partial(weighing.read, node=node))

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Text that spells a special token stays text, as it was when the teacher wrote it."""
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _queue(self, key: int, prompt: list[int], parameters, read: Read) -> None:
        """Give vLLM a request, whose output `read` makes an answer of. Raises EngineDead."""
        from vllm.exceptions import VLLMError

        request = str(self._serial)
        self._serial += 1
        try:
            (rendered,) = self.llm.renderer.render_cmpl([{"prompt_token_ids": prompt}])
            self.llm.llm_engine.add_request(request, rendered, parameters)
        except (VLLMError, RuntimeError) as error:
            if self._stepper:
                self._stepper.name_the_dead(self.processes)
            raise EngineDead(f"vLLM took no more requests: {error}") from error
        self._keys[request] = (key, read)

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        needed = prompt_tokens + max_tokens
        if needed > self.max_model_len:
            raise AskError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, {needed} "
                f"together, over max_model_len {self.max_model_len}. Raise --max_model_len or lower --max_tokens"
            )

    def collect(self) -> list[tuple[int, Completion | AskError]]:
        """Step until at least one ask has finished; return all that have, [] where nothing is in flight.

        Raises EngineDead.
        """
        finished = self.poll()
        while not finished and self._keys:
            finished = self.poll()
        return finished

    def poll(self) -> list[tuple[int, Completion | AskError]]:
        """One step at most, and what has finished; for who has asks to submit between steps. Raises EngineDead."""
        finished, self._refused = self._refused, []
        if not finished and self._keys:
            for output in self._step():
                if output.finished:
                    key, read = self._keys.pop(output.request_id)
                    answer = read(output)
                    if answer is not None:
                        finished.append((key, answer))
        return finished

    def _step(self) -> list:
        from vllm.exceptions import VLLMError

        try:
            return self._stepper.step(self.processes) if self._stepper else self.llm.llm_engine.step()
        except EngineDead:
            raise
        except (VLLMError, RuntimeError) as error:
            raise EngineDead(f"vLLM died while generating: {type(error).__name__}: {error}") from error

    def tokens(self) -> tuple[int, int]:
        """Written and read by the engines of this process, replies under way included. From any thread."""
        counts = {metric.name: metric.value for metric in self.llm.get_metrics() if metric.name in COUNTERS}
        return tuple(counts.get(name, 0) for name in COUNTERS)

    def close(self) -> None:
        """Drop what is in flight and free the engine's processes and memory. May be called again."""
        if self.llm is not None:
            self._keys.clear()
            if self._stepper:
                self._stepper.stop()
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self._stepper = None

    def facts(self) -> dict:
        """What the manifest keeps: the model and everything that can change its words."""
        return dict(self._facts)


def _completion(output, marks: ThinkingMarks, opened: str, messages: list[dict]) -> Completion | AskError:
    """vLLM's RequestOutput as ours."""
    (reply,) = output.outputs
    if reply.finish_reason not in ("stop", "length"):
        tokens = (len(output.prompt_token_ids), len(reply.token_ids), output.num_cached_tokens)
        return AskError(f"vLLM ended the reply with {reply.finish_reason!r}", *tokens)
    text, reasoning = marks.split(reply.text, opened, messages=messages, cut=reply.finish_reason == "length")
    return Completion(
        text=text,
        reasoning=reasoning,
        finish_reason=reply.finish_reason,
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(reply.token_ids),
        choice_logprobs=None,
        cached_tokens=output.num_cached_tokens,
        prefix=reply.text[: len(reply.text) - len(text)],
    )


class _Stepper:
    """Runs the engine's blocking step in a daemon thread, so that the caller can watch the engine's processes.

    Needed only where the engine lives in other processes: when one of them is killed, `step` waits for ever. The
    caller waits for each step to end before it does anything else, so two threads are never in the engine at once.
    """

    def __init__(self, step) -> None:
        self._begin: queue.SimpleQueue = queue.SimpleQueue()
        self._result: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(step,), name="vllm-step", daemon=True)
        self._thread.start()

    def _run(self, step) -> None:
        from vllm.exceptions import VLLMError

        while self._begin.get():
            try:
                self._result.put((step(), None))
            except (VLLMError, RuntimeError) as error:
                self._result.put(
                    ([], error)
                )  # anything else ends this thread with its traceback, and `step` sees that

    def step(self, processes: list) -> list:
        """One step's outputs. Raises what the step raised, or EngineDead once one of `processes` has ended."""
        self._begin.put(True)
        while True:
            try:
                outputs, error = self._result.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                self._check_alive(processes)
                continue
            if error is not None:
                self.name_the_dead(processes)
                raise error
            return outputs

    def name_the_dead(self, processes: list) -> None:
        """Raises EngineDead where vLLM has failed because one of the processes died, of which it says less than we do.

        It may see that before us: a dying process has closed its sentinel, but may have no exit code yet.
        """
        wait([process.sentinel for process in processes], timeout=WATCH_SECONDS)
        self._check_alive(processes)

    def _check_alive(self, processes: list) -> None:
        """Raises EngineDead where one of the processes, or the stepping thread, has ended."""
        ready = wait([process.sentinel for process in processes], timeout=0)
        for process in processes:
            if process.sentinel in ready:
                process.join(timeout=WATCH_SECONDS)
        if not self._thread.is_alive():
            raise EngineDead("vLLM's step failed, see the traceback above")
        # Of several the one that a signal killed, not those that vLLM ended because of it.
        for process in sorted(processes, key=lambda process: process.exitcode in (None, 0, 1, -signal.SIGTERM)):
            if not process.is_alive():
                raise EngineDead(
                    f"vLLM's process {process.name} ended with exit code {process.exitcode} "
                    "(-9: killed, mostly for want of memory)"
                )

    def stop(self) -> None:
        self._begin.put(False)
