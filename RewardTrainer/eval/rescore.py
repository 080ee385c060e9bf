"""Score stored outputs again: a benchmark's table from scores or verdicts in a file, with no model.

    python -m RewardTrainer.eval.rescore --benchmark example --scores output/eval/distilrm/scores.jsonl
    python -m RewardTrainer.eval.rescore --benchmark llmbar --data_dir D --verdicts verdicts.jsonl

Reads `scores.jsonl` as `eval_rm.sh` writes it, or `verdicts.jsonl` of a judge (both formats: `stored.py`), and the
benchmark's rows, by name or preference data. Prints the table. Rows without all of their lines are left out, named on
stderr and counted; a null is worth what the benchmark's own rule says of an unreadable answer, and otherwise leaves
its row out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distiller.records import InputError
from distiller.streams import patient_streams
from RewardTrainer.eval.base import summarize
from RewardTrainer.eval.benchmarks import load_benchmark
from RewardTrainer.eval.evaluation import accuracy_table
from RewardTrainer.eval.judge.ratings import rating_metric
from RewardTrainer.eval.stored import read_scores, read_verdicts

MESSAGES_SHOWN = 5


def rescore(name: str, data_dir: Path | None, scores: Path | None, verdicts: Path | None) -> tuple[dict, str]:
    """(the benchmark's numbers, what was counted) from one of the two files; says on stderr what was left out.

    Raises:
        InputError: benchmark or file cannot be read
    """
    benchmark = load_benchmark(name, data_dir)
    if scores is not None:
        stored, metric = read_scores(scores, name, benchmark.items), benchmark.by_scores
    else:
        stored, metric = read_verdicts(verdicts, name, benchmark.items), benchmark.by_verdicts
    if stored.rated:
        metric = rating_metric(benchmark)
    summary = summarize(metric, stored.items, stored.said)
    counted = sum(row["n"] for row in summary["subsets"].values())
    left_out = len(stored.items) - counted
    for message in [*benchmark.skipped, *stored.missing][:MESSAGES_SHOWN]:
        print(f"left out: {message}", file=sys.stderr)
    for count, what in (
        (len(benchmark.skipped), "rows of the benchmark cannot be read"),
        (len(stored.missing), "rows lack lines in the file"),
        (left_out, "rows have a null, or an order too few, and cannot count"),
        (stored.unknown, "lines are about rows that the benchmark does not have"),
    ):
        if count:
            print(f"{name}: {count} {what}", file=sys.stderr)
    for subset, rows in benchmark.short_subsets(stored.items).items():
        print(f"{name}: {subset} has {rows} rows; averages are over what is there", file=sys.stderr)
    if not counted:
        raise InputError(f"{name}: no row can count")
    return summary, f"{counted} of {len(benchmark.items) + len(benchmark.skipped)} rows"


@patient_streams()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, help="benchmark name, or preference data")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scores", type=Path, help="scores.jsonl")
    source.add_argument("--verdicts", type=Path, help="verdicts.jsonl")
    parser.add_argument("--data_dir", type=Path, help="directory with benchmark files, one folder <name>/ for each")
    args = parser.parse_args()
    try:
        summary, rows = rescore(args.benchmark, args.data_dir, args.scores, args.verdicts)
    except InputError as fault:
        sys.exit(f"error: {fault}")
    print(accuracy_table(args.benchmark, summary, rows))


if __name__ == "__main__":
    main()
