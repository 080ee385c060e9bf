"""What must be settled before vLLM is imported: which build it is, what a CPU engine needs, a model that can load."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distiller.cpu import usable_cores
from distiller.engine import EngineNotStarted

CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # load in 3 s instead of 25 s
    "TORCHDYNAMO_DISABLE": "1",  # no 15 s compilation at the first request
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_INFO = Path("/proc/cpuinfo")
CPU_BF16 = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # x86 and ARM
SMALL_MODEL = 100 << 20  # bytes of weights
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def vllm_version() -> str:
    """Version of the installed vLLM ("+cpu" for the CPU distribution), without importing it.

    Raises EngineNotStarted.
    """
    for distribution, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return metadata.version(distribution) + suffix
        except metadata.PackageNotFoundError:
            continue
    raise EngineNotStarted("vLLM is not installed: run `make env`, or use a server with --base_url")


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPU.

    The rule is vLLM's own, read from package metadata: importing torch to ask for CUDA would settle the OpenMP threads
    before they can be set.
    """
    asked_for = os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu"
    return asked_for or sys.platform == "darwin" or "cpu" in vllm_version()


def cpu_threads(model: str) -> int:
    """Threads for an in-process engine on a CPU: one for a tiny model in a local directory, else one a core that
    this process may use.

    On 2 free cores a second thread makes SmolLM2-135M 1.4 times faster, and the embedded teacher 1.3 times. But
    threads wait for each other by spinning: with another process on one of the cores two are 2.3 times slower than
    one, which a tiny model, with its many short steps, need not risk.
    """
    if _is_small(model):
        return 1
    return usable_cores()


def cpu_dtype(model: str) -> str:
    """`--dtype auto` on a CPU: bfloat16 where its instructions are there, float32 on other CPUs and for a tiny model.

    Reading weights is what a step takes most of its time for: Qwen2.5-0.5B writes 1.5 times as many tokens a second.
    """
    try:
        said = CPU_INFO.read_text()
    except OSError:  # not Linux
        said = ""
    return "bfloat16" if CPU_BF16.search(said) and not _is_small(model) else "float32"


def _is_small(model: str) -> bool:
    directory = Path(model).expanduser()
    return directory.is_dir() and sum(path.stat().st_size for path in directory.glob("*.safetensors")) < SMALL_MODEL


def prepare_cpu(threads: int = 1) -> None:
    """Set the environment of an in-process CPU engine, leaving alone what the user exported. Before importing vllm.

    Where torch was imported first it has already read OMP_NUM_THREADS, and setting it changes nothing: torch has to be
    told as well.
    """
    if "OMP_NUM_THREADS" not in os.environ and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    for name, value in (CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}).items():
        os.environ.setdefault(name, value)


def long_rope(config: Mapping, max_model_len: int) -> str | None:
    """Which set of rotary factors a longrope model (Phi-3) works with, "long" or "short"; None for any other model.

    vLLM settles it for all prompts when it starts: long where max_model_len is over the length of the first training.
    So two values of max_model_len can be two different teachers. `config`: the model's text configuration.
    """
    rope = config.get("rope_parameters") or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # some differ by layer
        if kind.get("rope_type") == "longrope":
            return "long" if max_model_len > kind["original_max_position_embeddings"] else "short"
    return None


def check_weights(model: str) -> None:
    """Refuse a model that cannot be loaded, before the seconds or minutes that vLLM needs to say so less clearly.

    `model` is a local directory or a hub name. Raises EngineNotStarted when it is neither, or when its weights are
    pickled or not whole.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            directory = Path(hf_hub_download(model, "config.json")).parent
        except (OSError, HFValidationError) as error:
            raise EngineNotStarted(
                f"teacher model {model!r}: no such directory (looked from {Path.cwd()}), and it cannot be fetched "
                f"from the hub either ({type(error).__name__}). Check --model and the current directory"
            ) from error
    names = [path.name for path in directory.iterdir()]
    if "config.json" not in names:
        raise EngineNotStarted(f"teacher model {model!r}: the directory has no config.json, so it is not a model")
    pickled = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise EngineNotStarted(
            f"teacher model {model!r}: only pickled weights ({', '.join(pickled[:3])}), which can run code when "
            "loaded and are never read here. Save the model again with save_pretrained, which writes safetensors"
        )
    for path in sorted(directory.glob("*.safetensors")):
        try:
            safe_open(path, framework="np").keys()  # reads the header, and compares with it the length of the file
        except (SafetensorError, OSError) as error:
            raise EngineNotStarted(
                f"teacher model {model!r}: {path.name} is not whole ({error}). Download it again; a file of some "
                "hundred bytes is mostly a pointer of git-lfs, for which there is `git lfs pull`"
            ) from error
