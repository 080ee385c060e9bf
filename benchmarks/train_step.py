"""What a training step costs: pairs a second and peak memory, beside two ways of writing the same step plainly.

    python benchmarks/train_step.py                                  # 10 minutes on two free cores
    python benchmarks/train_step.py --pairs 2 --rounds 1 --max_length 256                       # a quick look
    python benchmarks/train_step.py --shape 3b --pairs 16                                       # on a GPU; also MFU

One step is forward and backward of the whole loss (reward regression, SFT, KL to a live teacher of the same shape)
on the same pairs with the same random weights, a vocabulary of 151,936 and no optimizer:

    reference   two reward rows and two generation rows a pair, padded to --max_length; logits of all rows, in fp32
    competent   rows padded to the longest of the batch, one backbone pass, logits of the teacher's answers alone
    fast        what the trainer does: `RewardTrainer/train/`

Each runs in a process of its own, one after the other within a round, so that what else the machine does slows all
three alike; a figure is the median of the ratios within rounds. Each round has pairs of its own, as training has: what
is made anew for lengths that were not seen before must count. The first round warms up. Memory is the process's peak
resident set (on a GPU, allocated memory) minus that after loading the models; gradients count. The reference takes its
pairs one at a time and so needs the least memory it can, the competent step --competent_batch at a time. The three
losses must agree to 1e-3, or nothing is printed.

Two sets of pairs, token ids at random (so nothing but the prompt is shared), lengths log-normal: `answers`, answers of
median 200 tokens under prompts of median 30; `prompts`, prompts as long as answers. With `--pairs_file` also `file`:
random pairs of a JSONL file of yours (prompt, chosen, rejected, teacher_response) that fit --max_length, cut into
words, pieces of words and signs instead of a tokenizer's tokens; where `teacher_response` is missing, `chosen` read
backwards has its length and shares nothing with it. Last line: one JSON object.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from RewardTrainer.fused_layers import use_fused_layers
from RewardTrainer.packing import no_plans_by_shape
from RewardTrainer.train.batches import PairCollator
from RewardTrainer.train.data import PairFeatures
from RewardTrainer.train.losses import reward_loss
from RewardTrainer.train.speed import model_cost, pair_cost, peak_flops
from RewardTrainer.train.student import LiveTeacher, RewardStudent, choose_layout, reward_head, split_causal_lm

VOCABULARY = 151_936
PADDING = 271  # ids of the vocabulary that no token has, as in Qwen2.5
SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "3b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
}
INTERMEDIATE = {"small": 704, "3b": 11_008}
GOALS = {"reference": (8.0, 0.12), "competent": (1.5, None)}  # speed at least, memory at most
STEPS = ("reference", "competent", "fast")


def make_rounds(kind: str, args: argparse.Namespace) -> list[list[PairFeatures]]:
    """Pairs of every round, features as `data.encode_pairs` makes them; see the module docstring."""
    rng = np.random.default_rng(args.seed)
    count = args.pairs * (args.rounds + 1)
    texts = file_tokens(args, rng, count) if kind == "file" else random_tokens(kind, args, rng, count)
    if len(texts) < count:
        sys.exit(f"{args.pairs_file}: {len(texts)} pairs fit --max_length, {count} are needed")
    pairs = []
    for i, (prompt, chosen, rejected, answer) in enumerate(texts):
        generative = np.concatenate([prompt, answer])
        pairs.append(
            PairFeatures(
                id=str(i),
                pair_index=i,
                chosen_input_ids=np.concatenate([prompt, chosen]),
                rejected_input_ids=np.concatenate([prompt, rejected]),
                gen_input_ids=generative,
                gen_response_start=len(prompt),
                teacher_input_ids=generative,
                teacher_response_start=len(prompt),
                margin=float(rng.uniform(0, 4)),
                chosen_score=None,
                rejected_score=None,
                truncated=0,
            )
        )
    return [pairs[start : start + args.pairs] for start in range(0, count, args.pairs)]


def random_tokens(kind: str, args: argparse.Namespace, rng: np.random.Generator, count: int) -> list[list[np.ndarray]]:
    """Prompt, chosen, rejected and the teacher's answer of each pair."""

    def ids(median: float, longest: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(np.log(median), 0.6), 8, longest))
        return rng.integers(0, args.vocabulary - PADDING, length, dtype=np.int32)

    pairs = []
    for _ in range(count):
        prompt = ids(30 if kind == "answers" else 200, args.max_length // 2)
        pairs.append([prompt, *(ids(200, args.max_length - len(prompt)) for _ in range(3))])
    return pairs


def file_tokens(args: argparse.Namespace, rng: np.random.Generator, count: int) -> list[list[np.ndarray]]:
    """The same from texts; a piece's id is a hash of it."""

    def ids(text: str) -> np.ndarray:
        pieces = re.findall(r"\w{1,6}|[^\w\s]|\n", text)
        return np.array([zlib.crc32(piece.encode()) % (args.vocabulary - PADDING) for piece in pieces], dtype=np.int32)

    rows = [json.loads(line) for line in args.pairs_file.read_text(encoding="utf-8").splitlines()]
    pairs = []
    for i in rng.permutation(len(rows)):
        prompt, chosen, rejected = (ids(rows[i][name]) for name in ("prompt", "chosen", "rejected"))
        answer = ids(rows[i]["teacher_response"]) if "teacher_response" in rows[i] else chosen[::-1]
        longest = max(map(len, (chosen, rejected, answer)))
        if len(pairs) < count and len(prompt) and len(prompt) + longest <= args.max_length:
            pairs.append([prompt, chosen, rejected, answer])
    return pairs


# ---------------------------------------------------------------- the three steps


class Models:
    """Student and teacher with the same random weights in every process, and the three steps."""

    def __init__(self, args: argparse.Namespace, fused: bool):
        self.args = args
        no_plans_by_shape()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        config = Qwen2Config(
            vocab_size=args.vocabulary,
            intermediate_size=INTERMEDIATE[args.shape],
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **SHAPES[args.shape],
        )
        with torch.device(self.device):
            torch.manual_seed(0)
            self.lm, teacher = (Qwen2ForCausalLM(config).to(dtype).train() for _ in range(2))
            self.score = reward_head("linear", config.hidden_size)
        self.teacher_lm = teacher
        self.teacher = LiveTeacher(teacher)
        backbone, language_head = split_causal_lm(self.lm)
        self.student = RewardStudent(backbone, self.score, language_head)
        if fused:
            for model in (backbone, teacher.model):
                use_fused_layers(model, self.device)
        self.layouts = choose_layout("student", backbone, args.layout), choose_layout("teacher", teacher.model, None)
        if args.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self, name: str, pairs: list[PairFeatures]) -> float:
        """Forward and backward over all pairs; the loss."""
        size = {"reference": 1, "competent": self.args.competent_batch}.get(name)
        collate = PairCollator(0, layout=self.layouts[0], teacher_layout=self.layouts[1])
        if size is None:
            groups = collate.micro_batches(pairs, self.args.max_tokens_per_batch)
        else:
            groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        total = 0.0
        for group in groups:
            loss = (
                {"reference": self.reference, "competent": self.competent}[name](group)
                if size
                else self.fast(collate(group))
            )
            (loss / len(pairs)).backward()
            total += loss.item() / len(pairs)
        for parameter in self.student.parameters():
            parameter.grad = None
        return total

    def fast(self, batch: dict) -> torch.Tensor:
        """Sum of the pairs' losses, as `DistilTrainer.compute_loss` has it."""
        batch = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        count, rows = len(batch["labels"]), ("input_ids", "attention_mask", "position_ids", "segments")
        teacher = {name: batch[f"teacher_{name}"] for name in (*rows, "index") if f"teacher_{name}" in batch}
        outputs = self.student(
            **{
                name: batch[name]
                for name in (*rows, "reward_index", "gen_index", "gen_targets", "gen_pairs")
                if name in batch
            },
            num_pairs=count,
            teacher=self.teacher.signal_for(**teacher),
            shared_ids=self.args.vocabulary - PADDING,
            chunk_size=self.args.chunk_size,
        )
        chosen, rejected = outputs["rewards"].split(count)
        return reward_loss("margin_regression", chosen, rejected, batch["margin"]).sum() + outputs["loss"]

    def pad(self, rows: list[np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids, attention_mask (rows, length)."""
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row)
            mask[i, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)

    def rewards(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(rows, L, H) -> (rows,), at each row's last token."""
        return self.score(hidden[torch.arange(len(hidden)), mask.sum(-1) - 1]).squeeze(-1)

    def language_terms(self, sft_logits, kl_logits, teacher, ids, mask, pairs) -> torch.Tensor:
        """Sum over pairs of SFT and KL from whole logits (B, L, V) at the tokens ids (B, L)."""
        answer = mask.bool() & (
            torch.arange(ids.shape[1], device=ids.device)
            >= torch.tensor([pair["gen_response_start"] for pair in pairs], device=ids.device)[:, None]
        )
        answer = answer[:, 1:]  # (B, L - 1): the logits at t - 1 predict token t
        count = answer.sum(-1)
        labels = ids[:, 1:].masked_fill(~answer, -100)
        nll = F.cross_entropy(sft_logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        log_q = kl_logits[:, :-1, :-PADDING].log_softmax(-1)
        log_p = teacher[:, :-1, :-PADDING].log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * answer
        return (nll.sum(-1) / count + kl.sum(-1) / count).sum()

    def reference(self, pairs: list[PairFeatures]) -> torch.Tensor:
        count, length = len(pairs), self.args.max_length
        ids, mask = self.pad(
            [pair[name] for name in ("chosen_input_ids", "rejected_input_ids") for pair in pairs], length
        )
        output = self.lm(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        output.logits = output.logits.float()  # (2B, max_length, V), and nobody asks for them
        rewards = self.rewards(output.hidden_states[-1], mask)
        del output
        ids, mask = self.pad([pair["gen_input_ids"] for pair in pairs] * 2, length)
        logits = self.lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()  # (2B, max_length, V)
        ids, mask = ids[:count], mask[:count]
        with torch.no_grad():
            teacher = self.teacher_lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        margins = torch.tensor([pair["margin"] for pair in pairs], device=self.device)
        return ((rewards[:count] - rewards[count:] - margins) ** 2).sum() + self.language_terms(
            logits[:count], logits[count:], teacher, ids, mask, pairs
        )

    def competent(self, pairs: list[PairFeatures]) -> torch.Tensor:
        names, count = ("chosen_input_ids", "rejected_input_ids", "gen_input_ids"), len(pairs)
        rows = [pair[name] for name in names for pair in pairs]
        ids, mask = self.pad(rows, max(map(len, rows)))
        hidden = self.student.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        width = max(map(len, rows[2 * count :]))
        answers = slice(2 * count, 3 * count)
        logits = self.lm.lm_head(hidden[answers, :width]).float()  # (B, L, V)
        ids, own = ids[answers, :width], mask[answers, :width]
        with torch.no_grad():
            teacher = self.teacher_lm(input_ids=ids, attention_mask=own, use_cache=False).logits.float()
        rewards = self.rewards(hidden[: 2 * count], mask[: 2 * count])
        margins = torch.tensor([pair["margin"] for pair in pairs], device=self.device)
        return ((rewards[:count] - rewards[count:] - margins) ** 2).sum() + self.language_terms(
            logits, logits, teacher, ids, own, pairs
        )


# ---------------------------------------------------------------- measuring


@dataclass
class Measured:
    seconds: float
    peak: int  # bytes over those after loading
    loss: float
    mfu: float | None  # teacher's work included


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def worker(name: str, args: argparse.Namespace, pipe) -> None:
    """Load the models, then run a step for each list of pairs that comes."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = Models(args, fused=name == "fast")
    costs = [model_cost(model.backbone, model.language_head) for model in (models.student, models.teacher)]
    peak = peak_flops(models.device)
    gc.collect()
    cuda = models.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    pipe.send(None)
    while (pairs := pipe.recv()) is not None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        start = time.perf_counter()
        loss = models.step(name, pairs)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        taken = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before
        flops = sum(sum(pair_cost(pair, *costs)[1:]) for pair in pairs)
        pipe.send(Measured(seconds, taken, loss, flops / seconds / peak if peak else None))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that warms up")
    parser.add_argument("--lengths", choices=("answers", "prompts"), nargs="*", default=["answers", "prompts"])
    parser.add_argument("--pairs_file", type=Path, help="also measure on pairs of this JSONL file")
    parser.add_argument("--max_length", type=int, default=1024, help="what the reference pads to")
    parser.add_argument("--competent_batch", type=int, default=2, help="pairs at a time of the competent step")
    cuda = torch.cuda.is_available()
    budget, chunk = (16_384, None) if cuda else (1024, 128)
    parser.add_argument("--max_tokens_per_batch", type=int, default=budget, help="token budget of the fast step")
    parser.add_argument("--chunk_size", type=int, default=chunk, help="of the fast step; None: the trainer's default")
    parser.add_argument("--layout", choices=("shared_prefix", "padding_free", "padded"), help="of the fast step")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="number of logits")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=list(STEPS), help="leave some out")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not torch.cuda.is_available() and "reference" in args.steps:
        need = 13 * 4 * args.max_length * args.vocabulary  # fp32 logits of a row, 13 times: softmaxes, gradients, ...
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        if free < need:
            sys.exit(
                f"the reference needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free: smaller --max_length"
            )
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in args.steps:  # one at a time: loading takes every core
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(name, args, theirs), daemon=True).start()
        pipes[name].recv()

    ratios: dict[str, float] = {}
    details: dict[str, dict] = {}
    for lengths in [*args.lengths, *(["file"] if args.pairs_file else [])]:
        rounds: list[dict[str, Measured]] = []
        for pairs in make_rounds(lengths, args):
            rounds.append({})
            for name in args.steps:
                pipes[name].send(pairs)
                rounds[-1][name] = pipes[name].recv()
        losses = [measured.loss for measured in rounds[-1].values()]
        tolerance = 1e-3 if not torch.cuda.is_available() else 2e-2  # bf16
        if max(losses) - min(losses) > tolerance * abs(losses[0]):
            sys.exit(f"{lengths}: the steps do not compute the same loss: {losses}")
        rounds = rounds[1:]
        tokens = sum(len(pair["chosen_input_ids"]) + len(pair["rejected_input_ids"]) for pair in pairs)
        tokens += sum(len(pair["gen_input_ids"]) for pair in pairs)
        print(f"\n{lengths}: {len(pairs)} pairs, {tokens} tokens in their {3 * len(pairs)} rows, loss {losses[0]:.4f}")
        print(f"{'':12}{'pairs/s':>10}{'peak MiB':>10}")
        for name in args.steps:
            seconds = statistics.median(each[name].seconds for each in rounds)
            peak = max(each[name].peak for each in rounds)
            details[f"{lengths}_{name}"] = {"pairs_per_second": args.pairs / seconds, "peak_bytes": peak}
            print(f"{name:12}{args.pairs / seconds:10.3f}{peak / 2**20:10.0f}")
        for name, (speed_goal, memory_goal) in GOALS.items():
            if not {name, "fast"} <= set(args.steps):
                continue
            speed = statistics.median(each[name].seconds / each["fast"].seconds for each in rounds)
            memory = details[f"{lengths}_fast"]["peak_bytes"] / details[f"{lengths}_{name}"]["peak_bytes"]
            ratios |= {f"{lengths}_speed_over_{name}": speed, f"{lengths}_memory_of_{name}": memory}
            goals = f"goal {speed_goal:g}" + ("" if memory_goal is None else f" and {memory_goal:g}")
            print(f"fast is {speed:.2f} times as fast as {name} with {memory:.3f} of its memory ({goals})")
        for name in args.steps:
            if rounds[0][name].mfu is not None:
                ratios[f"{lengths}_{name}_mfu"] = statistics.median(each[name].mfu for each in rounds)
                print(f"{name}: MFU {ratios[f'{lengths}_{name}_mfu']:.1%} of {torch.cuda.get_device_name()}")
    for pipe in pipes.values():
        pipe.send(None)
    load = os.getloadavg()[0]
    print(f"\nload of the machine: {load:.1f} on {len(os.sched_getaffinity(0))} cores")
    print(json.dumps({"benchmark": "train_step", "ratios": ratios, "load": load, "steps": details}))


if __name__ == "__main__":
    main()
