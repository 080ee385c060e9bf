"""Telling a reward model from what only looks like one, before it is run.

1. *A head that was never trained.* `AutoModelForSequenceClassification` fills missing weights with random numbers and
   only warns; a plain causal LM then scores like a coin. Missing weights are refused.
2. *Two labels.* Comparing rewards needs one number; a two-label model is refused, not indexed.
3. *Pickled weights, remote code.* Never read; only on request, and then announced.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distiller.records import InputError
from distiller.tokens import with_fixed_date

REPOSITORY = Path(__file__).resolve().parents[3]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, on_gpu: bool) -> str:
    """`auto` is bfloat16 on a GPU, float32 on a CPU. Raises InputError for an unknown name."""
    if dtype == "auto":
        return "bfloat16" if on_gpu else "float32"
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    return dtype


def load_config(name: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a one-label model. Raises InputError."""
    _check_directory(name)
    if trust_remote_code:
        print(f"trust_remote_code: Python code shipped with {name} will run on this machine.", file=sys.stderr)
    config = from_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    if config.num_labels != 1:
        raise InputError(
            f"{name}: num_labels is {config.num_labels}, a reward model has 1 (architecture {config.architectures}; a "
            "config that does not say is read as 2, so a language model without a reward head ends here too)."
        )
    return config, with_fixed_date(from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code))


def load_model(
    name: str, config: PreTrainedConfig, dtype: str, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model, every weight of it from the checkpoint, a `score` head in fp32 in any case. Raises InputError."""
    in_fp32 = PreTrainedModel._keep_in_fp32_modules_strict
    PreTrainedModel._keep_in_fp32_modules_strict = {*(in_fp32 or ()), "score"}
    try:
        model, loading = from_pretrained(
            AutoModelForSequenceClassification,
            name,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = in_fp32
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{name}: the checkpoint lacks {_shown(missing)}; transformers fills them with random numbers, so every "
            "score would be chance. Is this a language model without a reward head, or has it a head of another kind "
            "(--trust_remote_code, if it brings its own code and you trust it)?"
        )
    if loading["unexpected_keys"]:
        print(
            f"note: weights in {name} that this model does not use: {_shown(sorted(loading['unexpected_keys']))}",
            file=sys.stderr,
        )
    return model


def from_pretrained(loader: type, name: str, **options: Any) -> Any:
    """`loader.from_pretrained(name, **options)`. Raises InputError, in one line, where transformers gives up."""
    try:
        return loader.from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        if Path(name).is_dir() or not isinstance(error, OSError):
            raise InputError(f"{name}: cannot be loaded: {said}") from error
        raise InputError(
            f"{name} is no directory here ({Path.cwd()}) and cannot be fetched from the hub: give a local directory, "
            f"or fetch it where there is a network. What was said: {said}"
        ) from error


def check_attention(name: str | None) -> None:
    """Raises InputError for an --attn_implementation that transformers does not know."""
    known = ["eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in each)]
    if name is not None and "/" not in name and name not in known:
        raise InputError(f"--attn_implementation {name}: not one of {', '.join(known)}, nor a kernel of the hub")


def _check_directory(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            remedy = "give the directory the model was saved to (a training that has not ended has saved none)"
            if (path / "adapter_config.json").is_file():
                remedy = "merge the LoRA adapter into its base first"
            elif any(path.glob("checkpoint-*")):
                remedy = "its training has not ended, and goes on with --resume_from_checkpoint last"
                saved = [*path.glob("checkpoint-*/config.json")]
                if saved:
                    newest = max(saved, key=lambda file: file.stat().st_mtime_ns).parent
                    remedy += f". The newest model in it: --model {newest}"
            raise InputError(f"{name}: the directory holds no config.json; {remedy}.")
        return
    above, missing = Path("..") / name, f"{name}: no such directory (current directory: {Path.cwd()})"
    if above.is_dir() and REPOSITORY in above.resolve().parents:
        raise InputError(f"{missing}; did you mean {above}?")
    if path.is_absolute() or name.startswith((".", "~")) or name.count(os.sep) > 1:
        raise InputError(f"{missing}. Train a reward model first (bash scripts/train_distilrm.sh), or give --model")
    if os.sep in name and (path.parent.is_dir() or above.parent.is_dir()):  # a typo would wait for the hub
        print(f"{missing}; looking for it on the hub", file=sys.stderr)


def _shown(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
