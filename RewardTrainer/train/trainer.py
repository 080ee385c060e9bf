"""`transformers.Trainer` for pairs: what counts how much, what is logged, evaluated and saved.

The mean is over all pairs of the optimizer step. The Trainer calls `compute_loss` once a micro-batch on every rank;
gradients are summed over micro-batches (`loss_is_scaled_for_ga` says that nothing is to be divided) and averaged over
ranks (by DDP and DeepSpeed alike). So each micro-batch returns

    sum of its pairs' losses * ranks / pairs of the whole step

and a ragged last micro-batch weighs what it holds. The number of pairs is known, over all ranks, before the step's
first forward.

The pairs that the data loader hands out at once go through the model in as many forwards as the token budget asks for
(`--max_tokens_per_batch`, or `token_budget.py`). Which pairs make a step, and their mean, stay what they are. All
ranks take the same number of forwards, the largest that one of them needs.

The host is to be ahead of the device: between two steps it has much to do, and the device nothing while it waits for
work. So the host waits for it once an optimizer step, when it reads whether the losses were finite, all of which are
known before the last backward pass ends (ZeRO-3 has it wait for the norm of the gradients, too; `zero_step.py`).
Nothing else reads a number from the device (the log does, every `--logging_steps`), or copies one there from memory
that is not pinned. Several ranks exchange numbers thrice more: before the first forward how many pairs and forwards
each has, and after the step whether all losses were finite and whether one was told to stop (`interruption.py`).
"""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from huggingface_hub import HfApi
from transformers import EvalPrediction, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from distiller.atomic import write_whole
from distiller.records import InputError
from RewardTrainer.eval.metrics import gap_margin_agreement
from RewardTrainer.memory import memory_for
from RewardTrainer.packing import to_device
from RewardTrainer.train import checkpoint
from RewardTrainer.train.batches import PairCollator, list_features, split_to
from RewardTrainer.train.cached_teacher import CachedTeacher
from RewardTrainer.train.data import PairFeatures
from RewardTrainer.train.fp32_head import MastersAtStart, follow_masters, hold_masters, with_masters
from RewardTrainer.train.generative import compact_shared
from RewardTrainer.train.interruption import COMPLETE_FILE, RUN_FILE, SaveOnSigterm, mark_complete
from RewardTrainer.train.lora import has_adapters, save_adapters
from RewardTrainer.train.losses import center_loss, check_weights, loss_spec, reward_loss
from RewardTrainer.train.speed import Speed, peak_flops, whole_run
from RewardTrainer.train.student import LiveTeacher
from RewardTrainer.train.token_budget import TokenBudget
from RewardTrainer.train.zero_step import LightZeroStep

logger = logging.getLogger(__name__)

HELD_OUT_FILE = "held_out.jsonl"
STUDENT_KEYS = (
    *("input_ids", "attention_mask", "position_ids", "segments"),
    *("reward_index", "gen_index", "gen_targets", "gen_pairs"),
)
TEACHER_KEYS = (
    *("input_ids", "index", "attention_mask", "position_ids", "segments"),  # of a live teacher
    *("top_ids", "top_logprobs", "tail"),  # of a cached one
)
# Columns of what evaluation gathers, one row a pair.
COLUMNS = ("chosen", "rejected", "margin", "loss_reward", "sft", "kl", "tokens", "kl_tokens")


class DistilTrainer(Trainer):
    """Trains a `RewardStudent` on pairs; `args` is a `DistilConfig`.

    data_collator: makes a micro-batch of pairs (the data loader only hands them out). teacher: for a loss with a KL
    term; a cached one is the collator's too. shared_ids: `SharedVocabulary.shared`, None for equal vocabularies.
    settings: what a checkpoint says it was made with (`interruption.run_settings`).
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *trainer_args,
        data_collator: PairCollator,
        teacher: LiveTeacher | CachedTeacher | None = None,
        shared_ids: torch.Tensor | None = None,
        settings: dict | None = None,
        **trainer_kwargs,
    ):
        super().__init__(
            *trainer_args, data_collator=list_features, compute_metrics=self.pair_metrics, **trainer_kwargs
        )
        self.collate = data_collator
        self.sft_weight, self.kl_weight = check_weights(
            self.args.loss_type, self.args.sft_weight, self.args.kl_weight, self.args.margin_scale
        )
        if self.kl_weight and teacher is None:
            raise InputError(
                "--kl_weight above 0 needs a teacher: give --teacher_model or --teacher_logprobs, or --kl_weight 0"
            )
        self.teacher = teacher
        self.shared_ids = compact_shared(shared_ids, self.args.device)
        self.budget = TokenBudget(self.args.max_tokens_per_batch, self.args.device)
        self.speed = Speed(self.model, teacher if isinstance(teacher, LiveTeacher) else None)
        dtypes = {parameter.dtype for parameter in self.model.backbone.parameters() if parameter.is_floating_point()}
        self.peak_flops = peak_flops(self.args.device, self.args.bf16 or self.args.fp16 or torch.float32 not in dtypes)
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage and (self.args.bf16 or self.args.fp16):
            hold_masters(self.model)
            self.add_callback(MastersAtStart())
        if plugin is not None:
            self.add_callback(LightZeroStep())
        # Of each forward since the last step: rows, their losses, and, on the host once the event has come, whether
        # all are finite.
        self._losses: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._losses_read: torch.cuda.Event | None = None
        self.settings = settings or {}
        self.held_out_pairs: dict[str, np.ndarray | None] = {}
        self.reward_scale: checkpoint.RewardScale | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self.add_callback(self.speed)
        self.add_callback(SaveOnSigterm())

    # One step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """What the data loader hands out for a step, each with the `groups` its pairs are cut into, and the number of
        pairs in all of it over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups, pairs = self.cut([batch["features"] for batch in batches])
        return [batch | {"groups": own} for batch, own in zip(batches, groups, strict=True)], pairs

    def cut(self, batches: Sequence[Sequence[dict]]) -> tuple[list[list[list[dict]]], int]:
        """The pairs of each batch in as many groups as the token budget asks for, as many as on every other rank; and
        the number of pairs over all ranks. All ranks must have equally many batches."""
        groups = [[list(features)] for features in batches]
        if self.budget.tokens is not None:
            groups = [self.collate.micro_batches(features, self.budget.tokens) for features in batches]
        pairs = sum(map(len, batches))
        if self.args.world_size > 1:
            counts = torch.tensor([[pairs, *map(len, groups)]], device=self.args.device)
            pairs_of_ranks, *counts = zip(*self.accelerator.gather(counts).tolist(), strict=True)
            groups = [split_to(own, max(count)) for own, count in zip(groups, counts, strict=True)]
            pairs = sum(pairs_of_ranks)
        return groups, pairs

    def _prepare_inputs(self, inputs: dict) -> dict:
        """To the device. Margins keep fp32: the Trainer would cast them to DeepSpeed's 16-bit type."""
        return {
            name: to_device(value, self.args.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward for each group of `get_batch_samples`; gradients are synchronized with the last one
        alone. A group is made a batch while the device is at work on the one before."""
        state, groups = self.accelerator.gradient_state, inputs["groups"]
        sync, total, largest = state.sync_gradients, 0.0, 0
        self.budget.begin()
        for i, group in enumerate(groups):
            batch = self.collate(group)
            largest = max(largest, batch["input_ids"].numel())
            last = i == len(groups) - 1
            state._set_sync_gradients(sync and last)
            engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED  # it goes by `sync_gradients`
            here = memory_for(self._forward_of(batch), self._less_memory(batch), self.args.device)
            with here, nullcontext() if last or engine else self.accelerator.no_sync(model):
                total = total + super().training_step(model, batch, num_items_in_batch)
        self.speed.count(inputs["features"])  # while the device is at work
        if sync:
            follow_masters(self.model)
            self.check_finite()
        if sync and self.budget.end(largest) is not None:
            logger.info("step %d: forwards of at most %d tokens from here", self.state.global_step, self.budget.tokens)
        return total

    def _forward_of(self, batch: dict) -> str:
        pairs, tokens = len(batch["labels"]), batch["input_ids"].numel()
        return f"step {self.state.global_step}, a forward and backward pass of {pairs} pairs, {tokens} tokens"

    def _less_memory(self, batch: dict) -> str:
        """Flags that would need less."""
        flags = []
        if len(batch["labels"]) > 1:
            flags.append(f"--max_tokens_per_batch {batch['input_ids'].numel() // 2} (the result is the same)")
        if not self.args.gradient_checkpointing:
            flags.append("--gradient_checkpointing true")
        if isinstance(self.teacher, LiveTeacher):
            flags.append("--teacher_logprobs in place of the teacher")
        if self.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            flags.append("ZERO=3 on several GPUs")
        return f"Less is needed with {', '.join([*flags, 'a smaller --max_length'])}."

    def check_finite(self) -> None:
        """Raises FloatingPointError, on all ranks, where a loss since the last call was not finite.

        One that stopped alone would leave the others waiting.
        """
        if self._losses_read is not None:
            self._losses_read.synchronize()
        broken = not torch.stack([finite for *_, finite in self._losses]).all()
        if self.args.world_size > 1:
            broken = self.accelerator.gather(torch.tensor([broken], device=self.args.device)).any()
        if broken:
            rows = [int(row) for index, pairs, _ in self._losses for row in index[~torch.isfinite(pairs)]]
            names = gather_object(self.row_names(rows))
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss of training rows {names} is not finite; "
                "lower --learning_rate or look at these rows"
            )
        self._losses = []

    def pair_terms(self, model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
        """Rewards and loss terms of a batch, each (pairs,): the names of `COLUMNS` that the batch has.

        And "generative", where the loss has language-model terms: their weighted sum over the pairs, a scalar, which
        alone carries their gradient.
        """
        pairs = len(inputs["labels"])
        arguments = {key: inputs[key] for key in STUDENT_KEYS if key in inputs}
        if "gen_index" in inputs:
            arguments |= {
                "num_pairs": pairs,
                "sft_weight": self.sft_weight,
                "kl_weight": self.kl_weight,
                "shared_ids": self.shared_ids,
                "temperature": self.args.kl_temperature,
                "chunk_size": self.args.chunk_size,
            }
            if self.teacher is not None and self.kl_weight:
                rows = {key: inputs[f"teacher_{key}"] for key in TEACHER_KEYS if f"teacher_{key}" in inputs}
                arguments["teacher"] = self.teacher.signal_for(**rows)
        outputs = model(**arguments)
        chosen, rejected = outputs["rewards"][:pairs], outputs["rewards"][pairs : 2 * pairs]
        fields = {name: inputs.get(name) for name in ("margin", "chosen_score", "rejected_score")}
        terms = {
            "chosen": chosen,
            "rejected": rejected,
            "loss_reward": reward_loss(
                self.args.loss_type, chosen, rejected, margin_scale=self.args.margin_scale, **fields
            ),
        }
        if self.args.center_rewards_coefficient:
            terms["center"] = center_loss(chosen, rejected)
        terms |= {name: outputs[name] for name in ("sft", "kl", "tokens", "kl_tokens") if name in outputs}
        if "loss" in outputs:
            terms["generative"] = outputs["loss"]
        if fields["margin"] is not None:
            terms["margin"] = fields["margin"]
        return terms

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See the module docstring; `num_items_in_batch` is the number of pairs of the step over all ranks."""
        terms = self.pair_terms(model, inputs)
        total = self.args.reward_weight * terms["loss_reward"].sum() + terms.get("generative", 0.0)
        if "center" in terms:
            total = total + self.args.center_rewards_coefficient * terms["center"].sum()
        names = ("loss_reward", "sft", "kl", "center")
        pairs = sum(terms[name].detach() for name in names if name in terms)
        self._losses.append((inputs["pair_index"], pairs, torch.isfinite(pairs).all().to("cpu", non_blocking=True)))
        if pairs.is_cuda:
            self._losses_read = torch.cuda.Event()
            self._losses_read.record()
        self._count(terms)
        loss = total * (self.args.world_size / num_items_in_batch)
        return (loss, terms) if return_outputs else loss

    def row_names(self, rows: list[int]) -> list[str]:
        """Ids of rows of the training set, given their positions."""
        return [str(self.train_dataset[row].get("id", row)) for row in rows]

    # The Trainer's own two would read the norm of the gradients, which DeepSpeed has clipped, at every step.

    def _clip_grad_norm(self, model):
        return None if self.is_deepspeed_enabled else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if self.is_deepspeed_enabled:
            return self.model_wrapped.get_global_grad_norm()
        return super()._get_grad_norm(model, grad_norm)

    # Logging

    def _count(self, terms: dict[str, torch.Tensor]) -> None:
        gap = terms["chosen"] - terms["rejected"]
        logged = {"loss_reward": terms["loss_reward"], "gap": gap, "accuracy": (gap.sign() + 1) / 2}  # a tie is half
        if self.sft_weight:
            logged["loss_sft"] = terms["sft"]
        if self.kl_weight:
            logged["loss_kl"] = terms["kl"]
        if "center" in terms:
            logged["loss_center"] = terms["center"]
        logged["pairs"] = torch.ones_like(gap)
        for name, values in logged.items():
            self._sums[name] = self._sums.get(name, 0) + values.detach().sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean over the pairs, of all ranks, since the last log. At the end the speed of steps that
        are in no log, and the figures of `speed.whole_run`."""
        if "loss" in logs and self._sums:
            names = list(self._sums)
            total = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
            sums = dict(zip(names, total, strict=True))
            pairs = sums.pop("pairs")
            logs |= {name: value / pairs for name, value in sums.items()} | self.speed_since_last_log()
            self._sums = {}
            latest = max((log["step"] for log in self.state.log_history if "loss" in log), default=0)
            if latest < self.speed.resumed_at:  # the steps up to the checkpoint that are in no log are lost
                logs["loss_steps"] = self.state.global_step - self.speed.resumed_at
        if "train_loss" in logs:
            rest = self.speed_since_last_log()
            if rest:
                super().log(rest)
            figures = whole_run(logs, self.state.log_history, self.state.global_step, self.speed.resumed_at)
            logs.clear()  # in place: `train` returns it
            logs.update(figures)
        super().log(logs, start_time)

    def speed_since_last_log(self) -> dict[str, float]:
        """step_seconds (their mean), slowest_step_seconds, tokens_per_second of all ranks and, on a GPU whose peak is
        known, mfu of the student and, with a live teacher, mfu_with_teacher: all without the run's first step, whose
        time is the compiler's. It stands in the first log, as first_step_seconds. {} where no step is left to log."""
        speed = {}
        if self.speed.first is not None:
            speed["first_step_seconds"], self.speed.first = self.speed.first, None
        seconds, steps, slowest, *counts = self.speed.take()
        if not steps:
            return speed
        counts = torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        tokens, student, teacher = self.accelerator.reduce(counts, "sum").tolist()
        speed |= {"step_seconds": seconds / steps, "slowest_step_seconds": slowest}
        speed["tokens_per_second"] = tokens / seconds
        if self.peak_flops is not None:
            available = seconds * self.peak_flops * self.args.world_size
            speed["mfu"] = student / available
            if teacher:
                speed["mfu_with_teacher"] = (student + teacher) / available
        return speed

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss (it would be averaged over batches, ragged or not) but a matrix (pairs, columns), then gathered."""
        parts, order = [], []
        ((groups,), _) = self.cut([inputs["features"]])
        for group in groups:
            batch = self._prepare_inputs(self.collate(group))
            with torch.no_grad(), self.compute_loss_context_manager():
                terms = self.pair_terms(model, batch)
            missing = torch.full_like(terms["chosen"], math.nan)
            parts.append(torch.stack([terms.get(name, missing).float() for name in COLUMNS], dim=1))
            order += batch["pair_index"].tolist()
        matrix = torch.cat(parts)  # (pairs, columns)
        place = {pair: i for i, pair in enumerate(order)}
        matrix = matrix[[place[feature["pair_index"]] for feature in inputs["features"]]]
        return None, matrix, inputs["labels"].to(self.args.device)

    def pair_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over held-out pairs, each pair once.

        accuracy (ties count as half), mean_gap, gap_margin_pearson and _spearman, gap_margin_slope (least
        squares, ideal 1 / margin_scale), loss and its terms (means over pairs), nll (nats a token over
        all response tokens). What is undefined is left out. The pairs of the latest evaluation stay in
        `held_out_pairs`: gap and margin, (pairs,) each, in the order of the rows.
        """
        columns = dict(zip(COLUMNS, np.asarray(prediction.predictions, dtype=np.float64).T, strict=True))
        gap, margin = columns["chosen"] - columns["rejected"], columns["margin"]
        if not np.isfinite(gap).all():
            raise FloatingPointError(
                f"step {self.state.global_step}: {np.count_nonzero(~np.isfinite(gap))} of {len(gap)} pairs "
                "have a reward that is not finite; lower --learning_rate"
            )
        metrics = {
            "accuracy": float(np.mean(np.where(gap == 0, 0.5, gap > 0))),
            "mean_gap": float(gap.mean()),
            "loss": self.args.reward_weight * float(columns["loss_reward"].mean()),
            "loss_reward": float(columns["loss_reward"].mean()),
        }
        if self.args.center_rewards_coefficient:
            metrics["loss_center"] = float(np.mean((columns["chosen"] + columns["rejected"]) ** 2))
            metrics["loss"] += self.args.center_rewards_coefficient * metrics["loss_center"]
        self.held_out_pairs = {"gap": gap, "margin": None if np.isnan(margin).any() else margin}
        if self.held_out_pairs["margin"] is not None:
            metrics |= {k: v for k, v in gap_margin_agreement(gap, margin).items() if v is not None}
        if not np.isnan(columns["sft"]).any():
            tokens = columns["tokens"].sum()
            metrics["nll"] = float((columns["sft"] * columns["tokens"]).sum() / max(tokens, 1))
            metrics["loss_sft"] = float(columns["sft"].mean())
            metrics["loss"] += self.sft_weight * metrics["loss_sft"]
            if self.kl_weight:
                metrics["loss_kl"] = float(columns["kl"].mean())
                metrics["loss"] += self.kl_weight * metrics["loss_kl"]
        return metrics

    def measure_rewards(self, pairs: Sequence[PairFeatures]) -> checkpoint.RewardScale:
        """Mean and deviation of the rewards of both answers of these pairs; the final model is saved with them."""
        rewards = self.predict(pairs).predictions[:, :2]  # (pairs, 2): chosen, rejected
        self.reward_scale = checkpoint.RewardScale(float(rewards.mean()), float(rewards.std()))
        return self.reward_scale

    # Checkpoints

    def push(self) -> None:
        """Upload what the output directory holds, but checkpoints and held-out rows, in one commit (`--push_to_hub`).

        `Trainer.push_to_hub` would save the model once more, and take the rows along.
        """
        if self.is_world_process_zero():
            HfApi().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message="End of training",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=["_*", "checkpoint-*", HELD_OUT_FILE],
            )

    def create_model_card(self, *_, **__) -> None:
        """`model_card.py` writes README.md at the end of a run; the Trainer's own, before a push, would replace it."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A stock model directory (`checkpoint.py`), from the student's weights or those a ZeRO engine gathered."""
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        student = self.accelerator.unwrap_model(self.model)
        final = output_dir == Path(self.args.output_dir)
        if has_adapters(student) and not final:
            save_adapters(student, output_dir, with_masters(student, state_dict) if state_dict else None)
        else:
            last = {"save_lm": self.args.save_lm, "scale": self.reward_scale, "normalize": self.args.normalize_rewards}
            own = last if final else {}
            checkpoint.save_student(student, self.processing_class, output_dir, state_dict or None, **own)
        write_whole(output_dir / "training_args.json", self.args.to_json_string() + "\n")

    def _save_checkpoint(self, model, trial) -> None:
        """Marks the directory once every rank has written its part, so that no run goes on from a killed save, nor
        from one without the optimizer (`--save_only_model`)."""
        mark = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE_FILE
        if self.args.should_save:
            mark.unlink(missing_ok=True)  # of an earlier run in the same directory
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_whole(mark.parent / RUN_FILE, json.dumps(self.settings, indent=2) + "\n")
            if not self.args.save_only_model:
                mark_complete(mark.parent)

    def _run_epoch(self, *args, **kwargs) -> None:
        """An epoch, unless the run is finished: resumed at its --max_steps, the Trainer would take another step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_best_model(self) -> None:
        """The Trainer would look for the module's own names in a file that has a stock model's."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
            follow_masters(self.accelerator.unwrap_model(self.model))
        else:
            logger.info("best model: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
            checkpoint.load_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights of both heads; DeepSpeed and FSDP read their own files."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoint.load_weights(self.model, resume_from_checkpoint)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, by the time it was completed; None if there is none."""
    complete = Path(output_dir).glob(f"checkpoint-*/{COMPLETE_FILE}")
    newest = max(complete, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if newest is None else str(newest.parent)


def generative_field(loss_type: str, sft_weight: float, kl_weight: float) -> str | None:
    """The record field whose text the language-model terms are computed on; None where both weigh nothing."""
    return loss_spec(loss_type).generative if sft_weight or kl_weight else None
