"""Pre-emption and resuming: a run that is told to stop saves a checkpoint, and a checkpoint is resumed with the
settings and the rows it was made with, or not at all.

SIGTERM or SIGUSR1 to any rank makes all of them finish the optimizer step, save a checkpoint and end with exit code
143. Further ones change nothing: a scheduler sends its signal to every process, and launchers pass theirs on. Before
the first step and after the last SIGTERM ends a rank at once, like SIGKILL.
"""

import hashlib
import json
import logging
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from distiller.atomic import write_whole
from distiller.records import InputError
from RewardTrainer.train.arguments import DistilConfig, ModelArguments
from RewardTrainer.train.data import PairFeatures

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
COMPLETE_FILE = "checkpoint_complete"
"""Beside it, once all files of the checkpoint are written: their names and sizes."""
EXIT_CODE = 128 + signal.SIGTERM
# Flags that do not decide a run's curve, by how they begin; all others do, known here or not. Where things are written
# and said; how steps are cut and spread (`pairs_a_step` and `optimizer_state` say what of that counts) and how fast
# they go; what is evaluated, kept, exported, uploaded.
HARMLESS = (
    *("output_dir", "logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_"),
    *("per_device_", "gradient_accumulation_steps", "average_tokens_across_devices", "layout", "max_tokens_per_batch"),
    *("chunk_size", "gradient_checkpointing", "torch_compile", "use_liger_kernel", "liger_kernel_config", "use_cache"),
    *("torch_empty_cache_steps", "tf32", "full_determinism", "attn_implementation", "trust_remote_code", "use_cpu"),
    *("parallelism_config", "ddp_", "fsdp", "deepspeed", "local_rank", "debug"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "length_column_name", "label_names"),
    *("eval_", "prediction_loss_only", "batch_eval_metrics", "include_", "do_", "skip_memory_metrics"),
    *("save_", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "enable_jit_checkpoint"),
    *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "push_to_hub", "hub_", "normalize_rewards"),
)


class Interrupted(Exception):
    """The run was told to stop; its checkpoint is on disk."""


class SaveOnSigterm(TrainerCallback):
    """See the module docstring. Raises `Interrupted` out of `Trainer.train` on every rank, once the save is whole."""

    def __init__(self) -> None:
        self.told = self.agreed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            logger.info("going on from step %d of %d", state.global_step, state.max_steps)
            state.compute_steps(args, state.max_steps)  # the checkpoint's --save_steps, ... would be obeyed, not ours
        self._before = {each: signal.signal(each, self._stop) for each in (signal.SIGTERM, signal.SIGUSR1)}

    def _stop(self, signum: int, frame: object) -> None:
        self.told = True

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.told
        if args.world_size > 1:  # a rank that stopped alone would leave the others waiting
            told = torch.tensor(int(self.told), device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            self.agreed = bool(told)
        if self.agreed:
            control.should_save = True
            control.should_evaluate = False
        return control

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            if args.world_size > 1:  # the launcher ends the others as soon as one is gone
                torch.distributed.barrier()
            for each in self._before:
                signal.signal(each, signal.SIG_IGN)  # this rank's own may come late: it is ending already
            raise Interrupted(f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        for each, before in self._before.items():
            signal.signal(each, before)


def run_settings(
    model_args: ModelArguments,
    args: DistilConfig,
    train_pairs: Sequence[PairFeatures],
    eval_pairs: Sequence[PairFeatures],
) -> dict:
    """All that decides a run's curve, as JSON values: settings, and a hash of the tokens and numbers of its pairs."""
    settings = {
        each.name: getattr(part, each.name)
        for part in (model_args, args)
        for each in fields(part)
        if not each.name.startswith(HARMLESS)
    }
    # How the step's pairs are spread over ranks and micro-batches is free.
    step = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    sampling = args.accelerator_config.to_dict()  # of batches; with it, of no account, a copy of the accumulation
    apart = ("gradient_accumulation_kwargs", "non_blocking")
    settings["accelerator_config"] = {name: value for name, value in sampling.items() if name not in apart}
    settings |= {"pairs_a_step": step, "optimizer_state": _optimizer_state(args)}
    settings |= {"train_pairs": _digest(train_pairs), "held_out_pairs": _digest(eval_pairs)}
    return json.loads(json.dumps(settings, default=str))


def _optimizer_state(args: DistilConfig) -> str:
    """Who can read the checkpoint's optimizer: only DeepSpeed reads its own, in the same stage on as many ranks."""
    if args.deepspeed:
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
        return f"DeepSpeed, ZeRO stage {stage}, {args.world_size} process(es)"
    return "FSDP" if args.fsdp else "one file"


def _digest(pairs: Sequence[PairFeatures]) -> str:
    """Number of pairs and 16 hex digits of a hash of what they hold."""
    digest = hashlib.sha256()
    for pair in pairs:
        for name, value in sorted(pair.items()):
            digest.update(f"|{name}:".encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return f"{len(pairs)} pairs, {digest.hexdigest()[:16]}"


def mark_complete(checkpoint: Path) -> None:
    """Say of a checkpoint that it is whole, and what is in it."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(COMPLETE_FILE)]
    text = json.dumps({str(path.relative_to(checkpoint)): _size(path) for path in sorted(files)}, indent=2)
    write_whole(checkpoint / COMPLETE_FILE, text + "\n")


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def check_resume(checkpoint: str | Path, settings: dict) -> None:
    """Raises InputError where the checkpoint lacks a part, or its run had other settings or rows, which it names."""
    file = Path(checkpoint) / RUN_FILE
    if not file.exists():
        raise InputError(f"--resume_from_checkpoint: {checkpoint} is no checkpoint of a run ({RUN_FILE} is missing)")
    if not (Path(checkpoint) / COMPLETE_FILE).exists():
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} is not whole: its save was killed, or --save_only_model left the "
            "optimizer out; begin anew"
        )
    try:
        written = json.loads((Path(checkpoint) / COMPLETE_FILE).read_text(encoding="utf-8"))
    except ValueError as fault:
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint}/{COMPLETE_FILE} is damaged ({fault}); begin anew"
        ) from fault
    if lost := [name for name, size in written.items() if size != _size(Path(checkpoint) / name)]:
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} is not whole any more: {', '.join(lost[:5])} is missing, or has "
            "not the length that it had; copy it again, or begin anew"
        )
    before = json.loads(file.read_text(encoding="utf-8"))
    differences = [
        f"  {name}: {before[name]} there, {settings.get(name)} here"
        for name in before  # a flag that is new since then has no value there
        if before[name] != settings.get(name)
    ]
    if differences:
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} was made with other settings or rows, and would not go on as it "
            "began:\n" + "\n".join(differences) + "\ngo back to these, or begin anew in another --output_dir"
        )
