"""QLoRA (`--load_in_4bit` with `--use_peft`): the linear layers of the backbone, which LoRA leaves frozen, in 4 bits.

As in the QLoRA paper (arXiv 2305.14314): NF4 in blocks of 64 weights, the blocks' scales quantized in their turn
(double quantization), products in bf16. Embeddings, norms, LM head, reward head and adapters are not quantized. What
is trained is then the dequantized backbone with adapters, and that is what is exported: a stock model, as large as
without this.
"""

from importlib import import_module

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from distiller.records import InputError


def check_4bit(device: torch.device, zero_stage: int = 0, fsdp: bool = False) -> None:
    """Raises InputError where a run cannot hold its student in 4 bits, with the way out."""
    if zero_stage == 3 or fsdp:
        raise InputError(
            f"--load_in_4bit: every process holds the whole 4-bit weights, which {'FSDP' if fsdp else 'ZeRO-3'} would "
            "cut up without their scales; use ZERO=2 or ZERO=1, or train without --load_in_4bit"
        )
    if not is_bitsandbytes_available():
        raise InputError("--load_in_4bit: bitsandbytes is not installed, or too old: pip install -U bitsandbytes")
    served = import_module("bitsandbytes").supported_torch_devices
    if device.type not in served:
        raise InputError(
            f"--load_in_4bit: bitsandbytes has nothing for the device {device.type!r}, only for "
            f"{', '.join(sorted(served))}; train without --load_in_4bit"
        )


def load_args_4bit(device: torch.device) -> dict:
    """What `from_pretrained` takes to load a model in 4 bits on `device`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def settle(backbone: PreTrainedModel) -> None:
    """What a backbone that was just loaded in 4 bits still needs, in place.

    Its config must not say that it is quantized (the exported model has it), and peft must know that it is.
    bitsandbytes must not lay the weights out anew at the first evaluation on a CPU: that is for inference alone, and
    fails for layers whose width is no multiple of its block. And it must not put the scales into `state_dict`, which
    `load_state_dict` (DeepSpeed's, on resuming) takes for unknown names: quantizing gives the same ones every time.
    """
    for name in ("quantization_config", "_is_quantized"):
        backbone.config.__dict__.pop(name, None)
    backbone.is_loaded_in_4bit = True
    for layer in _layers(backbone).values():
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_leave_out_scales)


def _layers(backbone: nn.Module) -> dict[str, nn.Module]:
    if not is_bitsandbytes_available():
        return {}
    kind = import_module("bitsandbytes").nn.Linear4bit
    return {name: module for name, module in backbone.named_modules() if isinstance(module, kind)}


def _leave_out_scales(layer: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def dequantized(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Name of each tensor of a 4-bit layer of the backbone -> its values, in the type that the model was loaded as.

    Weights are (out, in); those of layers that are kept transposed, as GPT-2's, were quantized as (out, in) and come
    back as (in, out). Biases are those of the training, which bitsandbytes rounds to bf16 when it first uses them.
    """
    tensors = {}
    for name, layer in _layers(backbone).items():
        weight = import_module("bitsandbytes").functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        tensors[f"{name}.weight"] = weight.T.contiguous() if is_transposed(layer) else weight
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach().to(weight.dtype)
    return tensors


def is_transposed(layer: nn.Module) -> bool:
    """Whether a 4-bit layer stands for one that keeps its weight as (in, out)."""
    return vars(layer).get("source_cls") is Conv1D
