"""The default teacher: vLLM in this process, one code path for GPU and CPU.

A rolling window: `submit` queues a request, `collect` steps the engine until something has finished. Against one big
`llm.chat(...)` call this costs nothing measurable, and every row can be written the moment it is done.

What the obvious way gets wrong, and this file therefore does itself:
1. One over-long prompt makes `llm.chat` raise for the whole batch, and `max_tokens` is clipped in silence where it does not fit.
   Here the prompt is rendered and counted first, and the ask that does not fit comes back alone, as an AskError.
2. A killed engine process (out of memory) leaves `llm.chat` waiting for ever. Here the process is watched.
3. On CPU the defaults either crash (a seeded request whose prefill is split) or are ten times slower (OpenMP threads under an
   in-process engine). `prepare_cpu` and the CPU arguments below are the settings that work.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
from importlib import metadata
from pathlib import Path

from distiller.chat import OPEN, check_messages, split_thinking
from distiller.engine import Ask, AskError, Completion, EngineDead, Sampling

CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # an in-process engine with more threads decodes ten times slower
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # load in 3 s instead of 25 s
    "TORCHDYNAMO_DISABLE": "1",  # no 15 s compilation at the first request
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WATCH_SECONDS = 2.0  # how often a running step looks whether the engine process is alive
QUEUED_AHEAD = 1.25  # asks in flight for each sequence vLLM runs at once, so that a freed slot never waits for us


def vllm_version() -> str:
    """Version of the installed vLLM, "+cpu" added for the CPU distribution, without importing it. Raises EngineDead."""
    for distribution, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return metadata.version(distribution) + suffix
        except metadata.PackageNotFoundError:
            continue
    raise EngineDead("vLLM is not installed: run `make env`, or use a server with --base_url")


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPU. The rule is vLLM's own, read from package metadata: importing torch to ask for
    CUDA would fix the OpenMP settings before they can be made."""
    asked_for = os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu"
    return asked_for or sys.platform == "darwin" or "cpu" in vllm_version()


def prepare_cpu() -> None:
    """Set the environment of an in-process CPU engine, leaving alone what the user exported. To be called before vllm is
    imported; `cli` may call it earlier still, before torch is."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check_weights(model: str) -> None:
    """Refuse a model that cannot be loaded, before the seconds or minutes that vLLM needs to say so less clearly.

    `model` is a local directory or a hub name. Raises EngineDead when it is neither, or when its weights are pickled.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            directory = Path(hf_hub_download(model, "config.json")).parent
        except (OSError, HFValidationError) as error:
            raise EngineDead(
                f"teacher model {model!r}: no such directory (looked from {Path.cwd()}), and not available from the hub either "
                f"({type(error).__name__}). Check --model; the embedded teacher is made by examples/build_models.py"
            ) from error
    names = [path.name for path in directory.iterdir()]
    if "config.json" not in names:
        raise EngineDead(f"teacher model {model!r}: the directory has no config.json, so it is not a model")
    pickled = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise EngineDead(
            f"teacher model {model!r}: only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded and are "
            "never read here. Save the model again with save_pretrained, which writes safetensors"
        )


class VLLMEngine:
    """A `TeacherEngine` on vLLM in process.

    model: local directory or hub name. max_model_len: context in tokens, None for the model's own. dtype: "auto" is the model's
    own on GPU and float32 on CPU. chat_template_kwargs: passed to the chat template, which ignores names it does not know
    (`{"enable_thinking": False}`). max_num_seqs: sequences decoded at once, None for vLLM's own.
    Raises EngineDead where the model cannot be loaded.
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
    ) -> None:
        check_weights(model)
        self.model = model
        self.sampling = sampling
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
        }
        if is_cpu_build():
            prepare_cpu()
            # Without chunked prefill vLLM itself raises max_num_batched_tokens to max_model_len, so no prefill is ever split.
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
            arguments["dtype"] = "float32" if dtype == "auto" else dtype
            arguments.pop("gpu_memory_utilization")  # on CPU a share of the whole RAM; VLLM_CPU_KVCACHE_SPACE says it in GiB
        children = set(multiprocessing.active_children())
        try:
            self.llm, self.tokenizer = self._load(arguments)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise EngineDead(
                f"vLLM could not load {model!r}: {error}\nWeights must be safetensors. If memory is short, lower --max_model_len "
                "or --gpu_memory_utilization, or raise --tensor_parallel_size; on CPU VLLM_CPU_KVCACHE_SPACE is the cache in GiB"
            ) from error
        self.processes = [child for child in multiprocessing.active_children() if child not in children]
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.capacity = int(self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs * QUEUED_AHEAD)
        self._keys: dict[str, tuple[int, bool]] = {}  # request id -> (the runner's key, the prompt opened the thinking)
        self._refused: list[tuple[int, AskError]] = []
        self._serial = 0
        self._stepper = _Stepper(self.llm.llm_engine.step) if self.processes else None
        try:
            self._render([{"role": "user", "content": "x"}])
        except ValueError as error:
            raise EngineDead(f"teacher model {model!r}: its tokenizer has no usable chat template: {error}") from error

    @staticmethod
    def _load(arguments: dict):
        from vllm import LLM

        llm = LLM(**arguments)
        return llm, llm.get_tokenizer()

    def _render(self, messages: list[dict]) -> tuple[list[int], bool]:
        """Token ids of the rendered conversation, and whether its end opens the thinking. Raises AskError for a conversation
        that the template refuses (roles that do not alternate, a system message it does not know)."""
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except TemplateError as error:
            raise AskError(f"the chat template refuses the conversation: {error}") from error
        # The template writes BOS itself where the model wants one: adding special tokens again would double it.
        return self.tokenizer.encode(text, add_special_tokens=False), text.rstrip().endswith(OPEN)

    def submit(self, key: int, ask: Ask) -> None:
        """Queue one ask; one that cannot be asked comes back from `collect` as an AskError. Raises EngineDead."""
        try:
            check_messages(ask.messages)
            prompt, opened = self._render(ask.messages)
            self._check_length(len(prompt))
        except AskError as refusal:
            self._refused.append((key, refusal))
            return
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=max(self.sampling.top_k, 0),
            max_tokens=self.sampling.max_tokens,
            seed=ask.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = str(self._serial)
        self._serial += 1
        try:
            (rendered,) = self.llm.renderer.render_cmpl([{"prompt_token_ids": prompt}])
            self.llm.llm_engine.add_request(request, rendered, parameters)
        except (VLLMError, RuntimeError) as error:
            raise EngineDead(f"vLLM took no more requests: {error}") from error
        self._keys[request] = (key, opened)

    def _check_length(self, prompt_tokens: int) -> None:
        needed = prompt_tokens + self.sampling.max_tokens
        if needed > self.max_model_len:
            raise AskError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {self.sampling.max_tokens}: together {needed}, over "
                f"max_model_len {self.max_model_len}. Raise --max_model_len or lower --max_tokens"
            )

    def collect(self) -> list[tuple[int, Completion | AskError]]:
        """Step until at least one ask has finished; return all that have. [] where nothing is in flight. Raises EngineDead."""
        finished, self._refused = self._refused, []
        while not finished and self._keys:
            for output in self._step():
                if output.finished:
                    key, opened = self._keys.pop(output.request_id)
                    finished.append((key, _completion(output, opened)))
        return finished

    def _step(self) -> list:
        from vllm.exceptions import VLLMError

        try:
            return self._stepper.step(self.processes) if self._stepper else self.llm.llm_engine.step()
        except (VLLMError, RuntimeError) as error:
            raise EngineDead(f"vLLM died while generating: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Drop what is in flight and free the engine's processes and memory. May be called again."""
        if self.llm is not None:
            self._keys.clear()
            if self._stepper:
                self._stepper.stop()
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.tokenizer = self._stepper = None

    def facts(self) -> dict:
        """What the manifest keeps: the model and everything that can change its words."""
        return {
            "engine": "vllm",
            "model": self.model,
            "dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "chat_template_kwargs": self.template_kwargs,
            "vllm": vllm_version(),
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
        }


def _completion(output, opened: bool) -> Completion | AskError:
    """vLLM's RequestOutput as ours."""
    (reply,) = output.outputs
    if reply.finish_reason not in ("stop", "length"):
        return AskError(f"vLLM ended the reply with {reply.finish_reason!r}")
    text, reasoning = split_thinking(reply.text, opened)
    return Completion(
        text=text,
        reasoning=reasoning,
        finish_reason=reply.finish_reason,
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(reply.token_ids),
        logprobs=None,
    )


class _Stepper:
    """Runs the engine's blocking step in a daemon thread, so that the caller can watch the engine's processes meanwhile.

    Needed only where the engine lives in other processes: when one of them is killed, `step` waits for ever. The caller waits
    for each step to end before it does anything else, so the engine is never entered by two threads at once.
    """

    def __init__(self, step) -> None:
        self._begin: queue.SimpleQueue = queue.SimpleQueue()
        self._result: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(step,), name="vllm-step", daemon=True).start()

    def _run(self, step) -> None:
        while self._begin.get():
            try:
                self._result.put((step(), None))
            except BaseException as error:  # noqa: BLE001 - handed to the calling thread, which raises it
                self._result.put((None, error))

    def step(self, processes: list) -> list:
        """One step's outputs. Raises what the step raised, or EngineDead once one of `processes` has ended."""
        self._begin.put(True)
        while True:
            try:
                outputs, error = self._result.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                for process in processes:
                    if not process.is_alive():
                        raise EngineDead(
                            f"vLLM's process {process.name} ended with exit code {process.exitcode} (-9: killed, mostly for "
                            "want of memory)"
                        ) from None
                continue
            if error is not None:
                raise error
            return outputs

    def stop(self) -> None:
        self._begin.put(False)
