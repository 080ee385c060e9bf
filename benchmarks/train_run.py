"""What the real training reaches: public script, DeepSpeed, optimizer and data loader, on a model of random weights.

    python benchmarks/train_run.py                                       # a small shape, 2 minutes on two free cores
    python benchmarks/train_run.py --shape 3b                            # on a GPU: Qwen2.5-3B's shape; also MFU
    python benchmarks/train_run.py --shape 3b --teacher_shape 14b --steps 20       # beside a teacher of Qwen3-14B's
    python benchmarks/train_run.py --shape 3b -- --gradient_checkpointing true     # flags after -- go to the script

Runs `scripts/train_distilrm.sh --config configs/train/paper.yaml` for `--steps` steps on pairs that are all different:
lengths log-normal, answers of median 200 tokens under prompts of median 30 (`--lengths prompts`: under prompts as long
as answers). Then, unless flags are passed on, `train_step.py` takes the same pairs through the bare step, with no
optimizer, launcher or data loader around it, and the ratio says what those cost. What is printed comes from what the
trainer itself writes, `metrics.json` and its log of every few steps:

    pairs/s, MFU       after the first log (10 steps on a GPU, else 3), until which kernels are compiled, and a GPU's
                       token budget is found
    first step         its seconds
    slowest            of the steps after the first log, over their median
    peak memory        on a GPU, of the first rank

Models and pairs are written to a temporary directory: 6 GB in the 3B shape, 30 GB more with the 14B teacher
(`--work_dir` says where, and keeps them). Last line: one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from train_step import INTERMEDIATE, SHAPES
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = {"small": 8192, "3b": 151_936}
TEACHER_14B = {
    **{"hidden_size": 5120, "intermediate_size": 17_408, "num_hidden_layers": 40, "num_attention_heads": 40},
    **{"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(rng: np.random.Generator) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """A tokenizer, and words of which each is one token to it, so that a text's length is known before it is written.

    To `train_step.py`, which cuts texts into pieces of six letters, they are one piece too.
    """
    words = sorted({"".join(letters) for letters in rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (1000, 4))})
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" " + " ".join(words)] * 3 + ["user\n assistant\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = CHATML
    return tokenizer, words


def write_model(path: Path, shape: str, vocabulary: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random weights, in bf16 where there is a GPU to make them on."""
    if path.exists():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "max_position_embeddings": 4096}
    if shape == "14b":
        build, config = Qwen3ForCausalLM, Qwen3Config(vocab_size=vocabulary, **TEACHER_14B, **ends)
    else:
        size = SHAPES[shape] | {"intermediate_size": INTERMEDIATE[shape], "tie_word_embeddings": True}
        build, config = Qwen2ForCausalLM, Qwen2Config(vocab_size=vocabulary, **size, **ends)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = build(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    del model
    torch.cuda.empty_cache()


def write_pairs(path: Path, args: argparse.Namespace, words: list[str], rng: np.random.Generator) -> None:
    """Scored pairs of random words; no two have the same lengths but by chance."""

    def text(median: float, longest: int) -> str:
        length = int(np.clip(rng.lognormal(np.log(median), 0.6), 8, longest))
        return "".join(f" {word}" for word in rng.choice(words, length))

    with path.open("w", encoding="utf-8") as file:
        for i in range(args.steps * args.pairs_per_step):
            row = {"id": str(i), "prompt": text(30 if args.lengths == "answers" else 200, 400)}
            row |= {name: text(200, 600) for name in ("chosen", "rejected", "teacher_response")}
            row |= {"chosen_score": 7.0, "rejected_score": 4.0, "margin": float(rng.uniform(0, 4))}
            file.write(json.dumps(row) + "\n")


def run(command: list, log: Path) -> str:
    """Its output, kept in `log`; ends the program where the command fails."""
    print("$", *command, flush=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, check=False, cwd=REPOSITORY
        )
    output = log.read_text(encoding="utf-8")
    if done.returncode:
        sys.exit(f"{output[-6000:]}\nthe command above ended with exit code {done.returncode}")
    return output


def train(args: argparse.Namespace, work: Path, more: list[str]) -> tuple[list[dict], dict]:
    """The logs after the first, and `metrics.json`."""
    cuda = torch.cuda.is_available()
    flags = {
        "config": "configs/train/paper.yaml",
        "model_name_or_path": work / args.shape,
        "teacher_model": work / (args.teacher_shape or args.shape),
        "train_file": work / "pairs.jsonl",
        "output_dir": work / "out",
        "max_steps": args.steps,
        "logging_steps": 10 if cuda else 3,
        "save_strategy": "no",
        "eval_ratio": 0,
        "per_device_train_batch_size": args.pairs_per_step,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "bf16": str(cuda).lower(),
        "teacher_dtype": "bfloat16" if cuda else "float32",
    }
    script = ["bash", REPOSITORY / "RewardTrainer/scripts/train_distilrm.sh"]
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    output = run([*script, *arguments, *more], work / "train_run.log")
    for line in output.splitlines():
        if any(said in line for said in ("layout", "layers", "forwards of at most", "GiB")):
            print(" ", line)
    state = json.loads((work / "out/trainer_state.json").read_text(encoding="utf-8"))
    metrics = json.loads((work / "out/metrics.json").read_text(encoding="utf-8"))
    return [log for log in state["log_history"] if "step_seconds" in log][1:], metrics


def bare_step(args: argparse.Namespace, work: Path) -> float:
    """Pairs a second of `train_step.py`'s fast step on the same pairs."""
    rounds = max(1, min(args.steps - 1, 8))
    command = [sys.executable, REPOSITORY / "benchmarks/train_step.py", "--steps", "fast", "--shape", args.shape]
    command += ["--pairs", args.pairs_per_step, "--rounds", rounds, "--pairs_file", work / "pairs.jsonl", "--lengths"]
    output = run([*command, "--vocabulary", VOCABULARY[args.shape]], work / "train_step.log")
    return json.loads(output.strip().splitlines()[-1])["steps"]["file_fast"]["pairs_per_second"]


def parse() -> tuple[argparse.Namespace, list[str]]:
    arguments = sys.argv[1:]
    own, more = arguments, []
    if "--" in arguments:
        own, more = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the student's, and the teacher's")
    parser.add_argument("--teacher_shape", choices=["14b"], help="another one's; then train_step.py has no part in it")
    parser.add_argument("--steps", type=int, default=60 if cuda else 15, help="of training")
    parser.add_argument("--pairs_per_step", type=int, default=16 if cuda else 4)
    parser.add_argument("--lengths", choices=("answers", "prompts"), default="answers", help="what is long")
    parser.add_argument("--work_dir", type=Path, help="for models, pairs and logs, which stay there")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(own), more


def main() -> None:
    args, more = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work_dir or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        vocabulary = VOCABULARY[args.shape]
        rng = np.random.default_rng(args.seed)
        tokenizer, words = build_tokenizer(rng)
        for shape in {args.shape, args.teacher_shape or args.shape}:
            write_model(work / shape, shape, vocabulary, tokenizer)
        write_pairs(work / "pairs.jsonl", args, words, rng)
        logs, metrics = train(args, work, more)
        if not logs:
            sys.exit("more --steps: they ended with the first log")
        seconds = [log["step_seconds"] for log in logs]
        pairs = args.pairs_per_step / statistics.fmean(seconds)
        slowest = max(log["slowest_step_seconds"] for log in logs) / statistics.median(seconds)
        speed = metrics["speed"]
        first = speed["first_step_seconds"]
        speed |= {name: statistics.fmean(log[name] for log in logs) for name in speed if name in logs[0]}
        ratios = {"slowest_step_over_median": slowest}
        ratios |= {name: speed[name] for name in ("mfu", "mfu_with_teacher") if name in speed}
        print(f"\n{args.steps} steps of {args.pairs_per_step} pairs: {pairs:.2f} pairs/s, ", end="")
        print(f"{speed['tokens_per_second']:.0f} tokens/s")
        print(f"first step {first:.1f} s; slowest step after the first log {slowest:.2f} times their median")
        if "mfu" in speed:
            both = speed.get("mfu_with_teacher", speed["mfu"])
            print(f"MFU {speed['mfu']:.1%} of the student, {both:.1%} with a live teacher's work", end="")
            print(f", on {torch.cuda.get_device_name()}")
        if "peak_memory_bytes" in speed:
            print(f"peak memory {speed['peak_memory_bytes'] / 2**30:.1f} GiB")
        if args.teacher_shape is None and not more:
            bare = bare_step(args, work)
            ratios["of_train_step"] = pairs / bare
            print(f"{ratios['of_train_step']:.2f} of the bare step's {bare:.2f} pairs/s")
    figures = {"pairs_per_second": pairs, **speed}
    load = os.getloadavg()[0]
    print(json.dumps({"benchmark": "train_run", "ratios": ratios, "shape": args.shape, "load": load, **figures}))


if __name__ == "__main__":
    main()
