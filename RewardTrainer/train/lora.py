"""LoRA (`--use_peft`): small trained matrices beside the frozen linear layers of the backbone.

peft puts the adapters into the backbone itself, which stays the model it was; the reward head is trained in full, the
LM head and the embeddings keep the base's weights. A layer W with adapters A (r, in) and B (out, r) computes

    W x + (lora_alpha / r) B A x

and the exported model holds W + (lora_alpha / r) B A: no trace of adapters is left in it. `<output_dir>/adapter` and
checkpoints hold adapters and reward head alone, in the format of peft:

    base = AutoModelForSequenceClassification.from_pretrained(the base, num_labels=1)
    model = PeftModel.from_pretrained(base, "<output_dir>/adapter")

With `--head mlp` the base is an `MLPRewardForSequenceClassification` around the backbone.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from distiller.records import InputError
from RewardTrainer.train.modeling_mlp_reward import MLPRewardForSequenceClassification
from RewardTrainer.train.quantization import dequantized, is_transposed
from RewardTrainer.train.student import RewardStudent

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
NAME = "default"  # peft's name for the only adapter


def add_adapters(
    student: RewardStudent, r: int, alpha: int, dropout: float, target_modules: Sequence[str] | None = None
) -> None:
    """Put adapters into the backbone, in place, and freeze all but them and the reward head.

    r: rank. target_modules: names of linear layers; None: all of them. Adapters are fp32, except under ZeRO-3, which
    wants one type in the model. Raises InputError where no layer has such a name, or one is not linear.
    """
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules or []) or "all-linear"
    )
    student.requires_grad_(False)
    try:
        inject_adapter_in_model(config, student.backbone)
    except ValueError as fault:
        raise InputError(f"--lora_target_modules: {fault}") from fault
    for name, layer in _layers(student.backbone).items():
        if NAME not in layer.lora_A:
            raise InputError(f"--lora_target_modules: {name} is not a linear layer")
    for name, parameter in student.named_parameters():
        if _is_adapter(name) or name.startswith("score."):
            parameter.requires_grad_(True)
            if _is_adapter(name) and not is_deepspeed_zero3_enabled():
                parameter.data = parameter.data.float()
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    packed = {torch.uint8: 2}  # 4-bit weights a byte
    every = sum(getattr(p, "ds_numel", p.numel()) * packed.get(p.dtype, 1) for p in student.parameters())
    logger.info("LoRA: %d of %d parameters are trained (%.2f%%)", trained, every, 100 * trained / every)


def has_adapters(student: RewardStudent) -> bool:
    """Whether `add_adapters` was here."""
    return bool(_layers(student.backbone))


def _layers(backbone: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)}


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def plain_names(backbone: PreTrainedModel) -> list[str]:
    """Names of the backbone's tensors, as they are without adapters."""
    return [name.replace(".base_layer.", ".") for name in backbone.state_dict() if not _is_adapter(name)]


def merged_state(student: RewardStudent, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`student.state_dict()`, or what a ZeRO engine gathered of it, with the adapters added to their layers.

    4-bit layers are dequantized first.
    """
    full = {f"backbone.{name}": tensor for name, tensor in dequantized(student.backbone).items()}
    plain = {name: tensor for name, tensor in (state | full).items() if not _is_adapter(name)}
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in plain.items()}
    for name, layer in _layers(student.backbone).items():
        prefix = f"backbone.{name}."
        a, b = (state[f"{prefix}lora_{which}.{NAME}.weight"].float() for which in "AB")  # (r, in), (out, r)
        delta = layer.scaling[NAME] * (b @ a)  # (out, in)
        weight = merged[f"{prefix}weight"]
        transposed = layer.fan_in_fan_out or is_transposed(layer.get_base_layer())  # as GPT-2 keeps its layers
        delta = delta.T if transposed else delta
        merged[f"{prefix}weight"] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    return merged


def _names(student: RewardStudent) -> dict[str, str]:
    """Name of each saved tensor in the student -> its name in peft's file."""
    head, backbone = "score", student.backbone.base_model_prefix
    if student.head == "mlp":
        head, backbone = "classifier", MLPRewardForSequenceClassification.base_model_prefix
    names = {f"score.{name}": f"base_model.model.{head}.{name}" for name in student.score.state_dict()}
    prefix = f"base_model.model.{backbone}."
    for name in student.backbone.state_dict():
        if _is_adapter(name):
            names[f"backbone.{name}"] = prefix + name.replace(f".{NAME}.", ".")
    return names


def save_adapters(student: RewardStudent, output_dir: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write adapters and reward head to `output_dir`, on one rank; `state` as for `merged_state`, None: its own."""
    output_dir.mkdir(parents=True, exist_ok=True)
    state = student.state_dict() if state is None else state
    tensors = {theirs: state[ours].contiguous() for ours, theirs in _names(student).items()}
    save_file(tensors, output_dir / ADAPTER_FILE, metadata={"format": "pt"})
    config = student.backbone.peft_config[NAME]
    saved = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        fan_in_fan_out=config.fan_in_fan_out,
        task_type="SEQ_CLS",
        modules_to_save=["score" if student.head == "linear" else "classifier"],
        base_model_name_or_path=student.config._name_or_path,
        inference_mode=True,
    )
    saved.save_pretrained(output_dir)


def load_adapters(student: RewardStudent, path: str | Path) -> None:
    """Put adapters and reward head of a checkpoint back. InputError if it is none of a run with these adapters."""
    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        raise InputError(f"{path} has no {ADAPTER_FILE}: it is not a checkpoint of a run with --use_peft")
    stored = load_file(file)
    state = {ours: stored[theirs] for ours, theirs in _names(student).items()}
    student.load_state_dict(state, strict=False)
