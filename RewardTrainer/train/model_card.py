"""`README.md` of a trained model: a Hugging Face model card with what it was trained on, how, and what came of it.

A card travels with its model: it names files and hub datasets, and no path of the machine.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from RewardTrainer.train.arguments import DataArguments, DistilConfig, ModelArguments
from RewardTrainer.train.cached_teacher import DEFAULT_TAIL
from RewardTrainer.train.data_stats import public_name
from RewardTrainer.train.losses import check_weights, loss_spec

USAGE = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # this directory, or where the model is
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path{code}).eval()

prompt = {{"role": "user", "content": "Which metal melts at 30 degrees Celsius?"}}
answers = ["Gallium.", "Iron, which melts at 30 degrees Celsius."]
texts = [
    tokenizer.apply_chat_template([prompt, {{"role": "assistant", "content": answer}}], tokenize=False)
    for answer in answers
]
batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    rewards = model(**batch).logits[:, 0]  # (answers,): the greater, the better
print(rewards.tolist())
"""
LORA = ("lora_r", "lora_alpha", "lora_dropout", "load_in_4bit")
HYPERPARAMETERS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay"),
    *("max_grad_norm", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed"),
    *("bf16", "fp16"),
)


def write_card(
    output_dir: str | Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistilConfig,
    metrics: Mapping,
) -> Path:
    """Write the card beside the saved model; `metrics` is what `metrics.json` has."""
    output_dir = Path(output_dir)
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    sources = [source.strip() for source in data_args.train_file.split(",")]
    base = public_name(model_args.model_name_or_path)
    hub = [name.split(":")[0] for name in sources if public_name(name) == name and "/" in name]
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=base,
        tags=["reward-model", args.loss_type],
        datasets=list(dict.fromkeys(hub)) or None,
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# Reward model from {base}",
        f"Trained by RM-Distiller with the loss `{args.loss_type}`. It gives a conversation one number, the reward of "
        "its last answer.",
        "## Use",
        f"```python\n{USAGE.format(code=', trust_remote_code=True' if model_args.head == 'mlp' else '')}```",
    ]
    parts.append(_scale(config, metrics["rewards"]))
    parts += ["## Data", _data(metrics["data"]), _held_out_line(data_args, metrics)]
    parts += ["## Training", _table(("", "value"), _settings(model_args, data_args, args))]
    if "step_seconds" in metrics["speed"]:
        parts.append(_speed(metrics["speed"], args))
    if "after" in metrics:
        parts += ["## Held-out pairs", _before_after(metrics)]
    if metrics.get("calibration"):
        parts += ["## Calibration", *_calibration(metrics["calibration"])]
    file = output_dir / "README.md"
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def _scale(config: Mapping, trained: Mapping) -> str:
    where = "held-out answers" if trained["held_out"] else "answers it was trained on"
    line = f"Rewards on {where}: mean {config['reward_mean']:.4g}, standard deviation {config['reward_std']:.4g}."
    if trained["normalized_in_export"]:
        line += (
            f" They were normalized after training, when these were {trained['mean']:.4g} and {trained['std']:.4g}; "
            "the reward gaps and losses below are in the scale of training."
        )
    return line


def _data(statistics: Sequence[Mapping]) -> str:
    names = ("file", "weight", "read", "distinct", "rows", "pairs", "dropped", "truncated", "tokens")
    rows = [[_shown(entry[name]) for name in names] for entry in statistics]
    header = ("file", "weight", "rows read", "trained on", "rows an epoch", "pairs", *names[6:8], "tokens an epoch")
    return _table(header, rows)


def _held_out_line(data_args: DataArguments, metrics: Mapping) -> str:
    pairs = metrics["counts"]["eval"]["pairs"]
    if not pairs:
        return "No pairs were held out."
    source = f"from `{public_name(data_args.eval_file)}`" if data_args.eval_file else "of these files, by prompt"
    return f"Held out: {pairs} pairs {source}."


def _settings(model_args: ModelArguments, data_args: DataArguments, args: DistilConfig) -> list[tuple[str, str]]:
    spec = loss_spec(args.loss_type)
    sft_weight, kl_weight = check_weights(args.loss_type, args.sft_weight, args.kl_weight, args.margin_scale)
    settings = {"loss_type": args.loss_type, "reward_weight": args.reward_weight}
    if spec.sft_weight is not None:
        settings["sft_weight"] = sft_weight
    if spec.kl_weight is not None:
        settings["kl_weight"] = kl_weight
    if kl_weight and model_args.teacher_logprobs:
        settings["teacher_logprobs"] = public_name(model_args.teacher_logprobs)
        settings["kl_tail"] = model_args.kl_tail or DEFAULT_TAIL
    elif kl_weight:
        settings["teacher_model"] = public_name(model_args.teacher_model)
    if spec.uses_margin:
        settings["margin_scale"] = args.margin_scale
    settings |= {"head": model_args.head, "max_length": data_args.max_length, "overlong": data_args.overlong}
    if model_args.use_peft:
        settings |= {name: getattr(model_args, name) for name in ("use_peft", *LORA)}
    given = args.to_dict() | {"world_size": args.world_size}
    settings |= {name: given[name] for name in HYPERPARAMETERS if name != "max_steps" or given[name] > 0}
    return [(f"`{name}`", _shown(value)) for name, value in settings.items()]


def _speed(speed: Mapping, args: DistilConfig) -> str:
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "a CPU"
    line = f"On {args.world_size} x {device}: {_shown(speed['step_seconds'])} s a step, "
    line += f"{speed['tokens_per_second']:.0f} tokens a second"
    if "mfu" in speed:
        line += f", MFU {speed['mfu']:.1%}"
    if "mfu_with_teacher" in speed:
        line += f" ({speed['mfu_with_teacher']:.1%} with the teacher's work)"
    return line + " in the median of the run's logs, its first step apart."


def _before_after(metrics: Mapping) -> str:
    before, after = metrics["before"] or {}, metrics["after"]
    skipped = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    names = [name for name in after if name.startswith("eval_") and name not in skipped]
    rows = [(name.removeprefix("eval_"), _shown(before.get(name)), _shown(after[name])) for name in names]
    return _table(("", "before", "after"), rows)


def _calibration(numbers: Mapping) -> list[str]:
    summary = ", ".join(f"{name} {_shown(numbers[name])}" for name in ("slope", "pearson", "spearman"))
    names = ("pairs", "margin", "gap", "gap_std")
    rows = [[_shown(one[name]) for name in names] for one in numbers["deciles"]]
    header = ("pairs", "mean margin", "mean reward gap", "standard deviation")
    text = f"Reward gap against margin on the held-out pairs: {summary}. Pairs in groups by margin:"
    return [text, _table(header, rows), "![Reward gap against margin](calibration.png)"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
