"""What a reward model is worth for choosing: the best of n responses by its reward, judged by a gold score.

Reads rows with a `prompt` and N `responses` each (`refine/generate_response_vllm.py --num_responses N`), rewards them
by the model and by the gold, and prints for n = 1, 2, 4, ... N

    gold     gold score of the response that the model picks from n, with a 95 % bootstrap interval over prompts
    reward   the model's own reward of it
    random   gold score of a random pick, the same for every n
    oracle   gold score of the gold's own pick: the most that n responses allow
    KL       of best-of-n from the policy, ln n - (n - 1) / n nats (an upper bound where responses repeat)

Where `reward` goes on rising and `gold` falls, the model is over-optimized. Each figure is the mean over all choices
of n of the N responses, not over one draw, and over the prompts. The gold is a larger reward model (--gold_model), or
two functions of your own (--gold_adapter, see engines/adapter.py).

    # the embedded world, whose gold is the truth
    python refine/generate_response_vllm.py --num_responses 16 --temperature 1.5 --top_k -1 --limit 200 \\
        --output data/responses/candidates.jsonl
    python -m RewardTrainer.eval.best_of_n --model output/distilrm --input data/responses/candidates.jsonl \\
        --gold_adapter examples/gold.py

Writes to --output_dir (default: output/best_of_n/<model name>) `rewards.jsonl` and `gold.jsonl`, which a second run of
the same command takes up again, `results.json` and `curve.svg`. N is the number of responses that most rows
have; rows with fewer, and those that cannot be rewarded, are left out and counted, and every n is over the same
prompts.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from distiller.arguments import parse_stage_args
from distiller.atomic import write_whole
from distiller.records import InputError, parse_columns, read_rows
from distiller.streams import patient_streams
from RewardTrainer.eval import score_file
from RewardTrainer.eval.figures import curves
from RewardTrainer.eval.outputs import write_json
from RewardTrainer.eval.score_file import ScoreFileArguments

REPLICATES = 1000
ALONE = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11"'
"""What a picture needs that stands in a file of its own and not in a page."""


@dataclass
class BestOfNArguments:
    """Flags of `best_of_n`."""

    model: str | None = field(default=None, metadata={"help": "Reward model: a directory, or a hub id."})
    input: str | None = field(default=None, metadata={"help": "Rows with prompt and responses, as score_file reads."})
    gold_model: str | None = field(default=None, metadata={"help": "Reward model that judges the picks."})
    gold_adapter: str | None = field(
        default=None, metadata={"help": "Python file with load and score that judges the picks."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Default: output/best_of_n/<model name>."})
    columns: str | None = field(default=None, metadata={"help": "Our field names for the input's: ours=theirs,..."})
    limit: int | None = field(default=None, metadata={"help": "Only the first rows."})
    overwrite: bool = field(default=False, metadata={"help": "Reward anew what is rewarded already."})
    engine: str = field(default="hf", metadata={"help": "hf (transformers) or vllm (its pooling runner)."})
    max_length: int | None = field(default=None, metadata={"help": "Longest conversation in tokens."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on GPU."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})


def pick_probabilities(rewards: Sequence[float], n: int) -> np.ndarray:
    """How probable it is that each response is the one picked from n random ones of them, without replacement.

    The i-th of N by reward is the best of n with probability C(i - 1, n - 1) / C(N, n); equal rewards share theirs,
    as a pick at random between them would.

    Args:
        rewards: of N responses to one prompt
        n: how many to choose from, 1 to N

    Returns:
        (N,), adding up to 1
    """
    total = math.comb(len(rewards), n)
    probabilities = np.zeros(len(rewards))
    below = 0
    for _, tied in groupby(sorted(range(len(rewards)), key=rewards.__getitem__), key=rewards.__getitem__):
        members = list(tied)
        up_to = below + len(members)
        share = (math.comb(up_to, n) - math.comb(below, n)) / total / len(members)
        probabilities[members] = share
        below = up_to
    return probabilities


def best_of(rewards: Sequence[Sequence[float]], values: Sequence[Sequence[float]], n: int) -> np.ndarray:
    """Mean value of the response picked by reward from n of a prompt's, (prompts,)."""
    pairs = zip(rewards, values, strict=True)
    return np.array([float(pick_probabilities(reward, n) @ np.asarray(value)) for reward, value in pairs])


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def figures(rewards: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], seed: int = 0) -> list[dict]:
    """One entry for each n (module docstring), every one over the same prompts.

    Args:
        rewards, gold: numbers for the responses of each prompt; n goes up to the least of a prompt
        seed: of the bootstrap
    """
    draws = np.random.default_rng(seed).integers(len(rewards), size=(REPLICATES, len(rewards)))
    table = []
    for n in sizes(min(map(len, rewards))):
        picked = best_of(rewards, gold, n)
        low, high = np.percentile(picked[draws].mean(axis=1), (2.5, 97.5))
        table.append(
            {
                "n": n,
                "kl": math.log(n) - (n - 1) / n,
                "gold": float(picked.mean()),
                "gold_interval": [float(low), float(high)],
                "reward": float(best_of(rewards, rewards, n).mean()),
                "random": float(best_of(rewards, gold, 1).mean()),
                "oracle": float(best_of(gold, gold, n).mean()),
            }
        )
    return table


def run(arguments: BestOfNArguments) -> dict:
    """Reward, judge, and write; returns what `results.json` holds.

    Raises:
        InputError: a request or input that cannot be used
    """
    for name in ("model", "input"):
        if not getattr(arguments, name):
            raise InputError(f"--{name} is needed")
    if bool(arguments.gold_model) == bool(arguments.gold_adapter):
        raise InputError("give --gold_model or --gold_adapter, one of them: what the picks are judged by")
    rows = read_rows(arguments.input, parse_columns(arguments.columns), arguments.limit)
    if not any(isinstance(row, dict) and row.get("responses") for row in rows):  # before a model is loaded
        raise InputError(
            f"{arguments.input}: no row has `responses`, a list; to get them, run: "
            "python refine/generate_response_vllm.py --num_responses 16"
        )
    directory = Path(arguments.output_dir or Path("output/best_of_n") / Path(arguments.model).name)
    gold_model = arguments.gold_model or arguments.gold_adapter
    ours = _rewards(arguments, arguments.model, None, directory / "rewards.jsonl")
    theirs = _rewards(arguments, gold_model, arguments.gold_adapter, directory / "gold.jsonl")
    both = [row for row in ours if row in theirs]
    if not both:
        raise InputError(f"{arguments.input}: no row has `responses` that could be rewarded")
    lengths = Counter(len(ours[row]) for row in both)
    most = max(lengths, key=lambda length: (lengths[length], length))
    whole = [row for row in both if len(ours[row]) >= most]
    table = figures([ours[row] for row in whole], [theirs[row] for row in whole])
    total = _rows(directory / "rewards.jsonl")
    counts = {"prompts": len(whole), "left_out": total - len(whole), "failed": total - len(both), "responses": most}
    results = {"model": arguments.model, "gold": gold_model, "counts": counts, "best_of_n": table}
    write_json(directory / "results.json", results)
    lines = {name: [(entry["n"], entry[name]) for entry in table] for name in ("oracle", "gold", "random")}
    picture = curves(lines, "n", "gold score")
    write_whole(directory / "curve.svg", picture.replace("<svg ", f"<svg {ALONE} ", 1).encode())
    print(
        f"{len(whole)} prompts with {most} responses or more; {counts['left_out']} rows left out: "
        f"{len(both) - len(whole)} with fewer, {counts['failed']} that could not be rewarded"
    )
    print(format_table(table))
    return results


def _rewards(arguments: BestOfNArguments, model: str, adapter: str | None, output: Path) -> dict[str, list[float]]:
    """{row id: rewards of its responses}"""
    shared = {name: getattr(arguments, name) for name in ("input", "columns", "limit", "overwrite", "max_length")}
    shared |= {name: getattr(arguments, name) for name in ("engine", "dtype", "trust_remote_code")}
    score_file.run(ScoreFileArguments(model=model, adapter=adapter, output=str(output), **shared))
    with output.open(encoding="utf-8") as file:
        rows = map(json.loads, file)
        return {row["id"]: row["rewards"] for row in rows if "rewards" in row}


def _rows(output: Path) -> int:
    """Rows that `score_file` was given: rewarded, or failed."""
    failed = Path(f"{output}.failed.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in (output, failed) if path.exists())


def format_table(table: Sequence[dict]) -> str:
    """The figures as lines of text."""
    lines = [f"{'n':>5}{'KL':>8}{'gold':>9}{'95 %':>18}{'random':>9}{'oracle':>9}{'reward':>9}"]
    for entry in table:
        low, high = entry["gold_interval"]
        lines.append(
            f"{entry['n']:>5}{entry['kl']:>8.2f}{entry['gold']:>9.4f}{f'{low:.4f} - {high:.4f}':>18}"
            f"{entry['random']:>9.4f}{entry['oracle']:>9.4f}{entry['reward']:>9.4f}"
        )
    return "\n".join(lines)


@patient_streams()
def main() -> None:
    arguments = parse_stage_args(BestOfNArguments, None, __doc__)
    try:
        run(arguments)
    except InputError as fault:
        sys.exit(f"error: {fault}")


if __name__ == "__main__":
    main()
