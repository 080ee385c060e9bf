"""Arguments of `run_reward_train.py`: model, rows, loss; the rest is `transformers.TrainingArguments`."""

import difflib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from textwrap import wrap
from typing import Literal, NoReturn, get_args, get_type_hints

import torch
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_liger_kernel_available
from trl import TrlParser

from distiller.arguments import expanded
from distiller.records import InputError
from RewardTrainer.eval.engines.loading import check_attention
from RewardTrainer.train.losses import LOSSES, check_weights

PATHS = {"model_name_or_path", "teacher_model", "teacher_logprobs", "train_file", "eval_file", "output_dir"} | {
    "resume_from_checkpoint"
}
LISTS = {"report_to", "debug", "fsdp", "include_for_metrics"}  # may be lists in a recipe, though not as flags
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelArguments:
    """Student and teacher."""

    model_name_or_path: str = field(
        metadata={
            "help": "Student: a causal LM, or a reward model (sequence classification, one label) to go on from."
        }
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Teacher of the KL term: a causal LM that knows the student's vocabulary."}
    )
    teacher_logprobs: str | None = field(
        default=None,
        metadata={
            "help": "Directory of cached teacher log-probabilities (refine/cache_teacher_logprobs_vllm.py): the KL "
            "term comes from there and no teacher is loaded."
        },
    )
    kl_tail: Literal["bucket", "renormalize"] | None = field(
        default=None,
        metadata={
            "help": "With --teacher_logprobs, what is not cached counts as one event (bucket, the default) or not at "
            "all (renormalize, which --kl_temperature other than 1 needs)."
        },
    )
    head: Literal["linear", "mlp"] = field(
        default="linear",
        metadata={
            "help": "Reward head. linear exports a stock model; mlp (one hidden layer) loads with remote code only."
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Precision of the student's weights. float32 with --bf16 is mixed precision."},
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the teacher's weights; auto is that of its checkpoint."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ...; None lets transformers choose."}
    )
    use_peft: bool = field(
        default=False, metadata={"help": "LoRA: train adapters and the reward head; the base stays frozen."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters' input."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the linear layers with adapters; None: all of the backbone's."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: with --use_peft, the frozen base in 4 bits (NF4). Needs bitsandbytes."},
    )
    model_revision: str = field(default="main", metadata={"help": "Hub revision of the student."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the models; a warning says so."}
    )

    def __post_init__(self):
        check_attention(self.attn_implementation)
        lora = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        given = [name for name in lora if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if given and not self.use_peft:
            raise InputError(f"--{given[0]} would be ignored: it goes with --use_peft")
        if self.load_in_4bit and not self.use_peft:
            raise InputError("--load_in_4bit: 4-bit weights cannot be trained themselves; it goes with --use_peft")
        if self.lora_r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise InputError("--lora_r and --lora_alpha must be above 0, --lora_dropout at least 0 and below 1")


@dataclass
class DataArguments:
    """Rows to train on and rows to hold out."""

    train_file: str = field(
        metadata={
            "help": "Pairs: a file (JSONL, JSON, CSV, Parquet, Arrow), a saved dataset, or one of the hub as "
            "owner/name:config:split; several are separated by commas."
        }
    )
    train_file_weights: str | None = field(
        default=None,
        metadata={
            "help": "How often an epoch sees the rows of each training file, 2,0.5: the first file's twice, those of "
            "half of the second one's prompts. None: once."
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "Held-out rows. Their prompts are not trained on."})
    eval_ratio: float = field(
        default=0.0, metadata={"help": "Without --eval_file: share of the rows to hold out, whole prompts at a time."}
    )
    columns: str | None = field(
        default=None, metadata={"help": "Other field names, ours=theirs: prompt=instruction,chosen=better"}
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first rows of the file."})
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows that cannot be used, counted by reason; else the first ends it."},
    )
    max_length: int = field(default=1024, metadata={"help": "Longest token row, prompt and response together."})
    overlong: Literal["drop", "truncate_prompt", "error"] = field(
        default="drop",
        metadata={
            "help": "What to do with longer rows. truncate_prompt cuts the prompt's left end, never the response."
        },
    )


# Flags of `TrainingArguments` that cannot work on pairs, or would do something else than they say: values that ask for
# nothing, and why no other is taken.
NO_PLACE: dict[str, tuple[tuple, str]] = {
    "label_smoothing_factor": ((0,), "these losses have no labels to smooth"),
    "neftune_noise_alpha": ((None, 0), "it adds noise to embeddings, from which rewards are read"),
    "remove_unused_columns": ((False,), "the collator reads every field of a pair"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "rows lie end to end without padding, so that lengths need no grouping",
    ),
    "batch_eval_metrics": ((False,), "metrics are over all held-out pairs at once"),
    "eval_do_concat_batches": ((True,), "metrics are over all held-out pairs at once"),
    "include_for_metrics": (([], None), "metrics are made of rewards and losses alone"),
    "bf16_full_eval": ((False,), "it would round the model itself, for good; --bf16 evaluates in bf16 as well"),
    "fp16_full_eval": ((False,), "it would round the model itself, for good; --fp16 evaluates in fp16 as well"),
    "dataloader_drop_last": ((False,), "it would leave held-out pairs out; a step of fewer pairs is a mean as well"),
    "include_num_input_tokens_seen": (("no",), "it does not know pairs; the log has tokens_per_second"),
    "auto_find_batch_size": (
        (False,),
        "it would change how many pairs a step has; --max_tokens_per_batch cuts a step into what fits",
    ),
    "enable_jit_checkpoint": ((False,), "SIGTERM saves a checkpoint as it is"),
    "torch_compile": ((False,), "rows have ever other lengths; attention on a GPU is compiled already"),
}


@dataclass
class DistilConfig(TrainingArguments):
    """`TrainingArguments` with the loss. On a machine without CUDA it trains on the CPU without being told."""

    loss_type: str = field(
        default="distilrm",
        metadata={"help": "Which loss; see RewardTrainer/train/losses.py.", "choices": list(LOSSES)},
    )
    reward_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on rewards."})
    sft_weight: float | None = field(
        default=None, metadata={"help": "Weight of the SFT term; None: the loss's own (1 where it has the term)."}
    )
    kl_weight: float | None = field(
        default=None, metadata={"help": "Weight of the KL term; None: the loss's own (1 where it has the term)."}
    )
    margin_scale: float = field(default=1.0, metadata={"help": "Margins are divided by it."})
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Adds this times (r_chosen + r_rejected)^2 to each pair's loss: rewards around 0."},
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Export rewards divided by their standard deviation, measured after training, and with --head mlp "
            "less their mean. A linear head cannot carry a shift."
        },
    )
    kl_temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL term."})
    layout: Literal["shared_prefix", "padding_free", "padded"] | None = field(
        default=None,
        metadata={
            "help": "How rows of a batch lie: without padding and what a pair's rows begin with once (shared_prefix), "
            "without padding, or padded to the longest. None: shared_prefix where the model allows it, else padded."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Cut what --per_device_train_batch_size hands out into forwards of at most so many student "
            "tokens, padding included (a longer pair is a forward of its own). The step's pairs and their mean do not "
            "change. None: what the GPU's memory allows, measured in the first steps; no bound on a CPU."
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Response tokens whose logits exist at once; less needs less memory. None: 1024, on a CPU 256."
        },
    )
    use_liger_kernel: bool | None = field(
        default=None,
        metadata={
            "help": "liger-kernel's fused norms, MLPs and rotary embeddings, in student and teacher. None: on a GPU, "
            "where it is installed and knows the model."
        },
    )
    save_lm: bool = field(
        default=False, metadata={"help": "Also write the student's language model, to <output_dir>/lm."}
    )
    # Other defaults than TrainingArguments has.
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a number of steps, or below 1 a share of them."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs, or below 1 a share of them."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads every field."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Would wait for the device, for nothing: a loss that is not finite ends the run."},
    )
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, wandb, ..."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "last: go on from the newest complete checkpoint in --output_dir; or a checkpoint's path."},
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the output directory once, at the end, without checkpoints."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "Must stay end: --push_to_hub uploads finished models."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self):
        if not torch.cuda.is_available():
            self.use_cpu = True
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
        if self.disable_tqdm is None and not (sys.stderr and sys.stderr.isatty()):
            self.disable_tqdm = True  # in a file bars are lines of cursor codes; the figures are printed all the same
        super().__post_init__()
        if not self.use_cpu:
            self.accelerator_config.non_blocking = True  # the data loader would wait for all that is under way
        check_weights(self.loss_type, self.sft_weight, self.kl_weight, self.margin_scale)
        if not 0 <= self.reward_weight < float("inf"):
            raise InputError(f"--reward_weight {self.reward_weight}: must be a finite number, 0 or above")
        center = self.center_rewards_coefficient or 0.0
        if not 0 <= center < float("inf"):
            raise InputError(f"--center_rewards_coefficient {center:g}: must be a finite number, 0 or above")
        if center and self.loss_type == "steerlm":
            raise InputError(
                f"--center_rewards_coefficient {center:g}: --loss_type steerlm learns the scores themselves, which "
                "are not around 0; leave it out"
            )
        if self.kl_temperature <= 0:
            raise InputError(f"--kl_temperature {self.kl_temperature:g}: must be above 0")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise InputError(f"--num_train_epochs {self.num_train_epochs:g}: must be above 0, or give --max_steps")
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*counts, "chunk_size", "max_tokens_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.use_liger_kernel and (self.use_cpu or not is_liger_kernel_available()):
            reason = "liger-kernel needs a GPU" if self.use_cpu else "liger-kernel is not installed"
            raise InputError(f"--use_liger_kernel: {reason}; train without it")
        for name, (harmless, reason) in NO_PLACE.items():
            if getattr(self, name) not in harmless:
                raise InputError(f"--{name} {getattr(self, name)}: {reason}; leave it out")
        if self.kl_temperature != 1 and not check_weights(self.loss_type, self.sft_weight, self.kl_weight)[1]:
            raise InputError(f"--kl_temperature {self.kl_temperature:g} would be ignored: there is no KL term")
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise InputError(
                f"--hub_strategy {self.hub_strategy.value}: a checkpoint is not the model that a run ends with (of "
                "LoRA it is the adapters alone); --push_to_hub uploads the finished model, leave it at end"
            )


class _Parser(TrlParser):
    """Its errors are one line, and values in a recipe are checked as they are on the command line."""

    recipe = ""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{_one_spelling(message)} (--help shows all flags)")

    def set_defaults_with_config(self, **values) -> list[str]:
        types = {name: each for part in self.dataclass_types for name, each in get_type_hints(part).items()}
        optional = {name for name, each in types.items() if type(None) in get_args(each)}
        values = {name: expanded(value) for name, value in values.items()}
        for action in self._actions:
            name, value = action.dest, values.get(action.dest)
            if name in values and value is None and name not in optional:
                raise InputError(f"{self.recipe}: argument --{name}: has no value; give one, or leave it out")
            if isinstance(value, list) and action.nargs is None and name not in LISTS:
                several = "several files are separated by commas" if name == "train_file" else "give one value"
                raise InputError(f"{self.recipe}: argument --{name}: is a list; {several}")
            if name == "resume_from_checkpoint" and isinstance(value, bool):
                values[name] = str(value).lower()  # which `find_checkpoint` knows
            elif name in PATHS and isinstance(value, bool):
                raise InputError(f"{self.recipe}: argument --{name}: is {value}; give a path or a name")
            elif name in PATHS and isinstance(value, int | float):  # a name of digits alone
                values[name] = str(value)
            if isinstance(value, str | bool | int | float):
                try:
                    self._check_value(action, self._get_value(action, str(value)))
                except ArgumentError as fault:
                    raise InputError(f"{self.recipe}: {_one_spelling(str(fault))}") from fault
        return super().set_defaults_with_config(**values)


def _one_spelling(message: str) -> str:
    """Of `--max_steps/--max-steps` the first."""
    return re.sub(r"(--\w+)/--[\w-]+", r"\1", message)


# Of transformers' flags those that --help explains; of the others it lists the names.
OFTEN_USED = (
    *("output_dir", "resume_from_checkpoint", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "logging_steps", "report_to"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "save_only_model"),
    *("load_best_model_at_end", "metric_for_best_model", "deepspeed", "fsdp", "fsdp_config", "use_liger_kernel"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
)
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_distilrm.sh"


def help_text() -> str:
    """What the script says of itself and its environment variables, then our own flags, then transformers'."""
    script = SCRIPT.read_text(encoding="utf-8").splitlines()[1:]
    lines = [line.removeprefix("#").removeprefix(" ") for line in takewhile(lambda line: line.startswith("#"), script)]
    parts = (ModelArguments, DataArguments, DistilConfig)
    flags = {action.dest: action for action in reversed(_Parser(parts)._actions)}  # of x and no_x the first
    theirs = {each.name for each in fields(TrainingArguments)}
    groups = {
        "Student and teacher": [each.name for each in fields(ModelArguments)],
        "Rows": [each.name for each in fields(DataArguments)],
        "Loss, speed, export": [each.name for each in fields(DistilConfig) if each.name not in theirs],
        "Of transformers.TrainingArguments": OFTEN_USED,
    }
    lines += ["", "--config FILE: YAML with values for these flags, which the command line overrides."]
    lines += ["Defaults hold where neither says anything."]
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for flag in (flags[name] for name in names):
            choices = f" {{{','.join(map(str, flag.choices))}}}" if len(flag.choices or ()) in range(1, 10) else ""
            default = "needed" if flag.required else f"default: {flag.default}"
            text = f"--{flag.dest}{choices}: {flag.help} ({default})".replace("%%", "%")
            lines += wrap(text, 118, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    others = theirs & flags.keys() - {*OFTEN_USED} - NO_PLACE.keys()
    return "\n".join([*lines, "", "And, as transformers documents them:", *wrap(", ".join(sorted(others)), 118)])


def parse(
    default_config: Path, arguments: Sequence[str] | None = None
) -> tuple[ModelArguments, DataArguments, DistilConfig]:
    """`--config recipe.yaml` with command-line override; without --config, `default_config`.

    Raises InputError for a recipe that cannot be read, an unknown key or flag, a value of the wrong type, and values
    that do not go together. `--help` prints the flags and ends the program.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        sys.exit()
    # `--config=x` and `--config x` alike; TrlParser knows the second.
    arguments = [
        part for text in arguments for part in (text.split("=", 1) if text.startswith("--config=") else (text,))
    ]
    if "--config" not in arguments:
        arguments = ["--config", str(default_config), *arguments]
    config = arguments[arguments.index("--config") + 1 :][:1]
    if not config or not Path(config[0]).is_file():
        raise InputError(f"--config {' '.join(config)}: no such file (current directory: {Path.cwd()})")
    parser = _Parser((ModelArguments, DataArguments, DistilConfig), allow_abbrev=False)
    parser.recipe = config[0]
    try:
        *parsed, of_recipe, given = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except InputError:
        raise
    except (ValueError, yaml.YAMLError) as fault:  # what TrainingArguments refuses
        raise InputError(str(fault)) from fault
    known = [name for part in parsed for name in part.__dataclass_fields__]
    for place, unknown in ((f"{config[0]}: ", of_recipe), ("", given)):
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag.lstrip("-"), known, n=1)
            raise InputError(f"{place}unknown argument {flag}" + (f", did you mean --{near[0]}?" if near else ""))
    for part in parsed:  # which a shell does, and a recipe does not
        for name in PATHS & part.__dataclass_fields__.keys():
            if getattr(part, name):
                paths = getattr(part, name).split(",")  # of --train_file there may be several
                setattr(part, name, ",".join(os.path.expanduser(path.strip()) for path in paths))
    return tuple(parsed)
