"""Train a reward model. Behind `scripts/train_distilrm.sh` and `scripts/train_rm.sh`.

Reads scored pairs (JSONL with prompt, chosen, rejected and what the loss needs: margin, teacher_response, ...).
Writes to `--output_dir` a stock sequence-classification model and `checkpoint-*` directories of the same kind;
`metrics.json`, `README.md` (a model card), `curves.png` and, of held-out pairs with margins, `calibration.png`; with
`--eval_ratio` the held-out rows, `held_out.jsonl`.

    python -m RewardTrainer.train.run_reward_train                                     # configs/train/example.yaml
    python -m RewardTrainer.train.run_reward_train --config configs/train/paper.yaml --learning_rate 2e-5
    python -m RewardTrainer.train.run_reward_train --resume_from_checkpoint last

Relative paths are relative to the current directory; the recipes expect RewardTrainer/. Several processes: through the
scripts (DeepSpeed launcher) or torchrun, not `accelerate launch`, which drops DeepSpeed on a CPU without a word.
"""

import atexit
import json
import logging
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from distiller.atomic import write_whole
from distiller.records import InputError, dump_line, parse_columns
from distiller.streams import patient_streams
from distiller.tokens import with_fixed_date
from RewardTrainer.eval.engines.encoding import longest_input
from RewardTrainer.eval.engines.loading import from_pretrained
from RewardTrainer.fused_layers import use_fused_layers
from RewardTrainer.memory import memory_for, memory_of, weights_gib
from RewardTrainer.packing import no_plans_by_shape
from RewardTrainer.train.arguments import DTYPES, DataArguments, DistilConfig, ModelArguments, parse
from RewardTrainer.train.batches import Layout, PairCollator
from RewardTrainer.train.cached_teacher import make_command, open_cache
from RewardTrainer.train.cached_teacher import teacher_tokenizer as load_teacher_tokenizer
from RewardTrainer.train.checkpoint import check_output_dir, load_student, load_tokenizer
from RewardTrainer.train.data import PairFeatures, encode_pairs, load_mixture, parse_weights
from RewardTrainer.train.data_stats import data_statistics, text_table
from RewardTrainer.train.interruption import COMPLETE_FILE, EXIT_CODE, Interrupted, check_resume, run_settings
from RewardTrainer.train.lora import add_adapters
from RewardTrainer.train.losses import check_weights, loss_spec
from RewardTrainer.train.model_card import write_card
from RewardTrainer.train.plots import calibration, draw_calibration, draw_curves
from RewardTrainer.train.quantization import check_4bit
from RewardTrainer.train.rows import check_file
from RewardTrainer.train.speed import summary
from RewardTrainer.train.student import LiveTeacher, choose_layout, runnable
from RewardTrainer.train.trainer import HELD_OUT_FILE, DistilTrainer, generative_field, last_checkpoint
from RewardTrainer.train.vocabulary import match_vocabularies

logger = logging.getLogger("RewardTrainer")

STATISTICS_PAIRS = 256  # whose rewards' mean and deviation go to config.json: held-out ones, else trained ones
STUDENT_REMEDY = "Less is needed with --dtype bfloat16, --use_peft --load_in_4bit, or ZERO=3 on several GPUs."
TEACHER_REMEDY = "Less is needed with --teacher_dtype bfloat16, and none with --teacher_logprobs."
# Of warnings that call for nothing: --save_steps and its like may change, or be a share of all steps, on the way
# (`interruption.py`); checkpoints that were written within a second are ordered by their numbers.
NOTHING_TO_DO = ("do not match the ones in the `trainer_state.json`", "mtime may not be reliable")
REPORTS = ("metrics.json", "README.md", "curves.png", "calibration.png", HELD_OUT_FILE)
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "RewardTrainer" / "configs" / "train"


def main(arguments: list[str] | None = None) -> None:
    """Train as the arguments say (sys.argv's by default). Raises as `train` does, and InputError as `parse` does."""
    train(*parse(CONFIGS / "example.yaml", arguments))


def train(model_args: ModelArguments, data_args: DataArguments, args: DistilConfig) -> None:
    """The whole command. Raises InputError, and Interrupted for a run that was told to stop and has saved its
    checkpoint."""
    sources = [source.strip() for source in data_args.train_file.split(",")]
    for source in [*sources, *([data_args.eval_file] if data_args.eval_file else [])]:
        check_file(source)
        if Path(source).resolve() == (Path(args.output_dir) / HELD_OUT_FILE).resolve():
            raise InputError(f"{source} is what this run replaces: copy it, or give another --output_dir")
    check_output_dir(args.output_dir, (model_args.model_name_or_path, model_args.teacher_model))
    set_up(model_args, args)
    sft_weight, kl_weight = check_weights(args.loss_type, args.sft_weight, args.kl_weight, args.margin_scale)
    generative = generative_field(args.loss_type, sft_weight, kl_weight)
    if model_args.load_in_4bit:
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if args.deepspeed else 0
        check_4bit(args.device, stage, fsdp=bool(args.fsdp))

    # Vocabularies, before any weight is read
    check_path("--model_name_or_path", model_args.model_name_or_path)
    check_path("--teacher_model", model_args.teacher_model)
    code = {"trust_remote_code": model_args.trust_remote_code}
    student_source = {"revision": model_args.model_revision, **code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **student_source)
    config = from_pretrained(AutoConfig, model_args.model_name_or_path, **student_source)
    limit = longest_input(config, tokenizer)
    if data_args.max_length > limit:
        logger.warning("--max_length %d is over what the student takes; it is %d", data_args.max_length, limit)
        data_args.max_length = limit
    teacher_tokenizer = teacher_limit = shared_ids = None
    cached = open_cache(model_args, data_args, kl_weight, args.kl_temperature)
    if kl_weight:
        if cached is not None:
            teacher_tokenizer = load_teacher_tokenizer(cached, model_args)
            teacher_vocabulary_size = cached.cache.info.vocab_size
        elif model_args.teacher_model is not None:
            teacher_tokenizer = with_fixed_date(from_pretrained(AutoTokenizer, model_args.teacher_model, **code))
            teacher_config = from_pretrained(AutoConfig, model_args.teacher_model, **code)
            teacher_vocabulary_size = teacher_config.get_text_config().vocab_size
            teacher_limit = longest_input(teacher_config, teacher_tokenizer)
        else:
            raise InputError(
                "the KL term needs a teacher: give --teacher_model or --teacher_logprobs, or train without it: "
                "--kl_weight 0"
            )
        vocabulary = match_vocabularies(
            AutoTokenizer.from_pretrained(model_args.model_name_or_path, **student_source),
            teacher_tokenizer,
            config.get_text_config().vocab_size,
            teacher_vocabulary_size,
        )
        shared_ids = vocabulary.shared
        logger.info("vocabularies match; the teacher alone has %d tokens", vocabulary.teacher_only)

    # Data
    needed = [*loss_spec(args.loss_type).needs, *([generative] if generative == "teacher_response" else [])]
    with args.main_process_first(desc="reading pairs"):
        mixture = load_mixture(
            sources,
            columns=parse_columns(data_args.columns),
            required=needed,
            eval_file=data_args.eval_file,
            eval_ratio=data_args.eval_ratio,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            limit=data_args.limit,
            weights=parse_weights(data_args.train_file_weights, sources),
            skip_bad_rows=data_args.skip_bad_rows,
        )
    encoding = {
        "student_tokenizer": tokenizer,
        "teacher_tokenizer": teacher_tokenizer,
        "generative": generative,
        "max_length": data_args.max_length,
        "overlong": data_args.overlong,
        "teacher_max_length": teacher_limit,
    }
    train_pairs, train_counts = encode_pairs(mixture.train, **encoding)
    eval_pairs, eval_counts = encode_pairs(mixture.held_out, **encoding)
    logger.info("train: %s", describe(train_pairs, train_counts))
    statistics = data_statistics(mixture.files, train_pairs)
    logger.info("training data: %s", text_table(statistics))
    logger.info("held out: %s", describe(eval_pairs, eval_counts) if eval_pairs else "no rows")

    if cached is not None:
        cached.check([*train_pairs, *eval_pairs], make_command(model_args, data_args, cached))
        logger.info("teacher: cached, no model in memory; %s", cached.cache.coverage())

    # Models
    load_args = (
        {} if model_args.attn_implementation is None else {"attn_implementation": model_args.attn_implementation}
    )
    student = load_student(
        model_args.model_name_or_path,
        tokenizer,
        head=model_args.head,
        language_head=generative is not None,
        dtype=DTYPES[model_args.dtype],
        in_4bit_on=args.device if model_args.load_in_4bit else None,
        **student_source,
        **load_args,
    )
    if args.device.type == "cuda" and not (args.fsdp or model_args.load_in_4bit or is_deepspeed_zero3_enabled()):
        if args.deepspeed and (args.bf16 or args.fp16):  # as DeepSpeed will, and less to move
            for part in filter(None, (student.backbone, student.language_head)):
                part.to(torch.bfloat16 if args.bf16 else torch.float16)
        with memory_for(f"the student of {weights_gib(student):.1f} GiB", STUDENT_REMEDY, args.device):
            student.to(args.device)  # where it is tried below
    if args.save_lm and student.language_head is None:
        raise InputError("--save_lm: this student started from a reward model and has no LM head")
    if model_args.use_peft:
        lora = (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout, model_args.lora_target_modules)
        add_adapters(student, *lora)
    teacher = cached
    if kl_weight and cached is None:
        with memory_for(f"the teacher {model_args.teacher_model} beside the student", TEACHER_REMEDY, args.device):
            teacher = LiveTeacher.load(
                model_args.teacher_model, args.device, dtype=DTYPES[model_args.teacher_dtype], **code, **load_args
            )
    if args.device.type == "cuda":
        beside = f", teacher {weights_gib(teacher.backbone):.1f} GiB" if isinstance(teacher, LiveTeacher) else ""
        logger.info("memory: student %.1f GiB%s; %s", weights_gib(student), beside, memory_of(args.device))

    layout = prepare("student", student.backbone, args)
    teacher_layout = prepare("teacher", teacher.backbone, args) if isinstance(teacher, LiveTeacher) else "padded"
    # Done: the Trainer would look for a `PreTrainedModel`, and find the student around one.
    use_liger_kernel, args.use_liger_kernel = args.use_liger_kernel, False

    # Training
    settings = run_settings(model_args, args, train_pairs, eval_pairs)
    resume_from = find_checkpoint(args)
    if resume_from is not None:
        check_resume(resume_from, settings)
    elif eval_pairs:
        args.eval_on_start = True
    trainer = DistilTrainer(
        model=student,
        args=args,
        teacher=teacher,
        shared_ids=shared_ids,
        settings=settings,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs or None,
        processing_class=tokenizer,
        data_collator=PairCollator(
            tokenizer.pad_token_id,
            None if teacher_tokenizer is None else teacher_tokenizer.pad_token_id,
            layout=layout,
            teacher_layout=teacher_layout,
            cached_teacher=cached,
        ),
    )
    args.use_liger_kernel = use_liger_kernel  # as it was asked for, in what is written of this run
    check_launch(trainer)
    earlier = figures_after(resume_from, args.output_dir)
    try:
        result = trainer.train(resume_from_checkpoint=resume_from)
    except Interrupted as stopped:
        how = "no run can, for want of its optimizer" if args.save_only_model else "--resume_from_checkpoint last"
        logger.warning("told to stop; to go on from %s: %s", stopped, how)
        trainer.end()
        raise

    if trainer.is_world_process_zero():
        for name in REPORTS:  # an earlier run's, of another model
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    logger.info("training is done: saving the model, measuring its rewards%s", " and evaluating it" * bool(eval_pairs))
    # The model first, which nothing below may cost; again with how its rewards lie. (_internal_call: not pushed yet)
    trainer.save_model(_internal_call=True)
    measured = (eval_pairs or train_pairs)[:STATISTICS_PAIRS]
    scale = trainer.measure_rewards(measured)
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    metrics = {"train": result.metrics}
    metrics["counts"] = {"train": dict(train_counts), "eval": dict(eval_counts)}
    metrics["data"] = statistics
    metrics["speed"] = summary(trainer.state.log_history, args.device)
    if trainer.state.global_step == trainer.speed.resumed_at:  # finished before: exported anew, not trained
        metrics |= earlier
    # All metrics are in the scale of training; the export's may be another one.
    metrics["rewards"] = {**scale._asdict(), "pairs": len(measured), "held_out": bool(eval_pairs)}
    metrics["rewards"]["normalized_in_export"] = args.normalize_rewards and scale.std > 0
    if eval_pairs:
        metrics["before"] = next((log for log in trainer.state.log_history if "eval_loss" in log), None)
        metrics["after"] = trainer.evaluate()
        logger.info("held out, after training: %s", figures_in_words(metrics["after"]))
        held_out_pairs = trainer.held_out_pairs
        metrics["calibration"] = calibration(**held_out_pairs)
    if trainer.is_world_process_zero():
        if data_args.eval_ratio:
            held_out = b"".join(map(dump_line, mixture.held_out))
            write_whole(Path(args.output_dir) / HELD_OUT_FILE, held_out)
        file = Path(args.output_dir) / "metrics.json"
        write_whole(file, json.dumps(metrics, indent=2) + "\n")
        if metrics.get("calibration"):
            draw_calibration(file.with_name("calibration.png"), numbers=metrics["calibration"], **held_out_pairs)
        draw_curves(file.with_name("curves.png"), trainer.state.log_history)
        write_card(args.output_dir, model_args, data_args, args, metrics)
        logger.info("reward model in %s, metrics in %s", args.output_dir, file)
    if args.push_to_hub:
        trainer.push()
    trainer.end()


def set_up(model_args: ModelArguments, args: DistilConfig) -> None:
    """Logging on the first rank alone, seeds, and warnings about settings."""
    first = args.process_index == 0
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if first else logging.ERROR,
        stream=sys.stderr,
    )
    for noisy in ("httpx", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("transformers.trainer_utils").addFilter(
        lambda record: not any(words in str(record.msg) for words in NOTHING_TO_DO)
    )
    set_seed(args.seed)
    no_plans_by_shape()
    if args.deepspeed:
        # On a CPU, TrainingArguments starts torch.distributed alone, and ZeRO-3 would partition the student for one
        # process.
        import deepspeed

        deepspeed.init_distributed()
    if model_args.trust_remote_code:
        logger.warning("trust_remote_code: code that comes with the models runs with your rights")
    if args.normalize_rewards and model_args.head == "linear":
        logger.warning(
            "--normalize_rewards: a linear head has no bias, so rewards are divided by their standard deviation and "
            "their mean stays; --head mlp carries a shift, --center_rewards_coefficient keeps the mean near 0"
        )


def check_path(flag: str, path: str | None) -> None:
    """A path that is plainly local must exist; transformers would take it for a name on the hub."""
    if path is None or Path(path).expanduser().is_dir():
        return
    above, missing = Path("..") / path, f"{flag} {path}: no such directory (current directory: {Path.cwd()})"
    if above.is_dir() and REPOSITORY in above.resolve().parents:
        raise InputError(f"{missing}; did you mean {above}?")
    if path.startswith((".", "/", "~")):
        raise InputError(missing)
    if "/" in path and (Path(path).parent.is_dir() or above.parent.is_dir()):  # a typo would wait for the hub
        logger.warning("%s; looking for it on the hub", missing)


def prepare(name: str, backbone: PreTrainedModel, args: DistilConfig) -> Layout:
    """Layers and layout that a model trains with, each tried in the precision of training, and said in the log."""
    whole = runnable(backbone) and backbone.device.type == args.device.type
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, dtype, enabled=(args.bf16 or args.fp16) and whole and not args.deepspeed):
        layers = use_fused_layers(backbone, args.device, args.use_liger_kernel, args.liger_kernel_config, whole)
        logger.info("%s: %s", name, layers)
        return choose_layout(name, backbone, args.layout, args.device)


def describe(pairs: list[PairFeatures], counts: Counter) -> str:
    """What of the file is used, in one line."""
    longest = [
        max(
            len(pair[name])
            for name in ("chosen_input_ids", "rejected_input_ids", "gen_input_ids")
            if pair[name] is not None
        )
        for pair in pairs
    ]
    lengths = torch.tensor(longest, dtype=torch.float)
    kept = ", ".join(f"{number} {name}" for name, number in counts.items() if number or name in ("pairs", "truncated"))
    return f"{kept}; tokens in a pair's longest row: mean {lengths.mean():.0f}, max {int(lengths.max())}"


def figures_in_words(metrics: dict[str, float]) -> str:
    """An evaluation's metrics in one line, without its speed."""
    names = [name for name in metrics if name.startswith("eval_") and not name.endswith(("runtime", "_per_second"))]
    return ", ".join(f"{name.removeprefix('eval_')} {metrics[name]:.4g}" for name in names)


def find_checkpoint(args: DistilConfig) -> str | None:
    """What `--resume_from_checkpoint` (a path, `last` or `true`) names; None to start anew."""
    wanted = args.resume_from_checkpoint
    if wanted is not None and wanted.lower() not in ("last", "true", "false"):
        return wanted
    last = last_checkpoint(args.output_dir)
    if wanted is None or wanted.lower() == "false":
        if last is not None:
            remedy = "to go on from it: --resume_from_checkpoint last"
            logger.warning("starting anew beside %s, which new checkpoints will replace; %s", last, remedy)
        return None
    if last is None:
        logger.warning("%s has no complete checkpoint: starting from the beginning", args.output_dir)
    return last


def figures_after(checkpoint: str | None, output_dir: str) -> dict:
    """What metrics.json says of the training, where it was written after this checkpoint, its last; else {}."""
    file = Path(output_dir) / "metrics.json"
    if checkpoint is None or not file.exists():
        return {}
    if file.stat().st_mtime_ns < (Path(checkpoint) / COMPLETE_FILE).stat().st_mtime_ns:
        return {}
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # torn
        return {}
    return {name: metrics[name] for name in ("train", "speed") if name in metrics}


def check_launch(trainer: DistilTrainer) -> None:
    """Says how the run is distributed, and refuses one that is not what was asked for."""
    args, accelerator = trainer.args, trainer.accelerator
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched or args.world_size != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but each trains in a group of {accelerator.num_processes}: "
            "use the deepspeed launcher (scripts/) or torchrun"
        )
    if args.deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"--deepspeed is set, but training would run as {accelerator.distributed_type.value}: "
            "use the deepspeed launcher (scripts/)"
        )
    if args.fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise RuntimeError(
            f"--fsdp is set, but training would run as {accelerator.distributed_type.value}: FSDP takes several GPUs, "
            "a process each (torchrun)"
        )
    if args.deepspeed and not accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}).get(
        "stage3_gather_16bit_weights_on_model_save", accelerator.state.deepspeed_plugin.zero_stage != 3
    ):
        raise InputError(
            f"--deepspeed {args.deepspeed}: ZeRO-3 without `stage3_gather_16bit_weights_on_model_save` cannot save a "
            "model; set it to true under `zero_optimization`"
        )
    if args.n_gpu > 1:
        raise RuntimeError(
            f"one process sees {args.n_gpu} GPUs and would split batches between them: start one process a GPU with "
            "scripts/train_*.sh or torchrun, or show it one with CUDA_VISIBLE_DEVICES"
        )
    stage = f", ZeRO stage {accelerator.state.deepspeed_plugin.zero_stage}" if args.deepspeed else ""
    logger.info(
        "%s%s, %d process(es), %s%s; %d pairs a step",
        args.device,
        f" ({torch.get_num_threads()} thread(s) a process)" if args.device.type == "cpu" else "",
        launched,
        accelerator.distributed_type.value,
        stage,
        launched * args.per_device_train_batch_size * args.gradient_accumulation_steps,
    )


def _refused_at(fault: Exception) -> str | None:
    """Where a library refused what it is set up with (a value out of its range, a package that it wants, a place that
    it cannot reach), which it says itself; None for any other fault: one of a step, or raised in this code or by the
    language."""
    frames = traceback.extract_tb(fault.__traceback__)
    kinds = ValueError | TypeError | ImportError | OSError | RuntimeError
    in_step = any(frame.name in ("training_step", "evaluate", "measure_rewards", "save_model") for frame in frames)
    _, library, file = frames[-1].filename.rpartition("site-packages/")
    refused = isinstance(fault, kinds) and str(fault) and not in_step and library
    return f"{file}, line {frames[-1].lineno}" if refused else None


@patient_streams()
def program() -> NoReturn:
    """`main` and the end of the process, with exit code 0, 1 (a fault that the user can mend; others keep their
    traceback), 2 (arguments that are wrong by themselves) or 143 (told to stop).

    Not by way of the interpreter's own end: a thread that torch or DeepSpeed left running aborts the rank there now
    and then ("terminate called without an active exception"), and the launcher takes a finished run for a failed one.
    """
    code = 2
    try:
        arguments = parse(CONFIGS / "example.yaml")
        code = 1
        train(*arguments)
        code = 0
    except (InputError, FloatingPointError) as fault:
        print(f"error: {fault}", file=sys.stderr)
    except torch.OutOfMemoryError as fault:
        said = str(fault).partition(". ")[0]
        remedy = "--gradient_checkpointing true, a smaller --max_tokens_per_batch, --teacher_logprobs, or --use_peft"
        print(f"error: out of memory: {said}. Less is needed with {remedy}.", file=sys.stderr)
    except Interrupted:
        code = EXIT_CODE
    except Exception as fault:
        if place := _refused_at(fault):
            said = " ".join(str(fault).split())
            print(f"error: {type(fault).__name__}: {said} (from {place})", file=sys.stderr)
        else:
            traceback.print_exc()
    atexit._run_exitfuncs()  # trackers upload their last lines there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    program()
