"""Evaluate a reward model: reward every response of some benchmarks, write accuracies, scores and a report.

    bash scripts/eval_rm.sh                    # what train_distilrm.sh made, on the embedded benchmark
    bash scripts/eval_rm.sh --model org/reward-model --benchmarks example,../data/test_pairs.jsonl
    bash scripts/eval_rm.sh --config my.yaml --max_length 2048 --dtype float32

Reads any sequence-classification reward model with one label, safetensors weights and a chat template (a directory or
a hub id), and benchmarks by name or preference files by path. Writes to the output directory, over what an earlier run
left there:

    results.json   {"model", "benchmarks": {name: {"subsets", "averages", "overall"}}, "counts": {name: {...}}}
    scores.jsonl   one line for each response: benchmark, id, subset, response (its index in the row), score
    report.html    tables, reward histograms, gap against margin, worst mistakes; opens offline

and prints the accuracies.

A row that cannot be scored (malformed, empty response, repeated id, refused by the chat template) is left out, named
on stderr and counted in results.json. A conversation longer than --max_length loses the left end of its prompt, never
the end of its response.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from distiller.arguments import parse_stage_args
from distiller.records import InputError
from RewardTrainer.eval.benchmarks import load_benchmark
from RewardTrainer.eval.evaluation import Evaluation, accuracy_table, evaluate, results, write_scores
from RewardTrainer.eval.report import build_report

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "eval" / "example.yaml"
MESSAGES_SHOWN = 20


@dataclass
class EvalArguments:
    """Flags of `eval_rm.sh`; a YAML file given with --config uses the same names."""

    model: str = field(default="../output/distilrm", metadata={"help": "Reward model: a directory, or a hub id."})
    benchmarks: str = field(
        default="example", metadata={"help": "Comma-separated benchmark names and preference files."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Directory with benchmark files, one folder <name>/ for each benchmark."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Default: ../output/eval/<model name>."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest conversation in tokens; default: all the model takes."}
    )
    tokens_per_batch: int = field(
        default=16384, metadata={"help": "Rows x longest row of one batch. Changes speed and memory, not scores."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on GPU, else float32."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers (eager, sdpa, ...); default: the model's own."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})


def default_output_dir(model: str) -> Path:
    """`../output/eval/<model name>`; a trainer checkpoint is named after its run too, for they all are
    `checkpoint-N`."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    return Path("../output/eval") / name


def run(arguments: EvalArguments) -> list[Evaluation]:
    """Evaluate and write the three files. Raises InputError before anything is written."""
    names = [name.strip() for name in arguments.benchmarks.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--benchmarks {arguments.benchmarks}: one or more different names expected")
    data_dir = Path(arguments.data_dir) if arguments.data_dir else None
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such directory")
    benchmarks = [load_benchmark(name, data_dir) for name in names]  # before the model: a typo shows at once

    from RewardTrainer.eval.scoring import load_scorer  # torch and transformers take seconds: not for --help or a typo

    scorer = load_scorer(
        arguments.model,
        dtype=arguments.dtype,
        max_length=arguments.max_length,
        tokens_per_batch=arguments.tokens_per_batch,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    evaluations = []
    for benchmark in benchmarks:
        start = time.monotonic()
        evaluation = evaluate(benchmark, scorer, show_progress=True)
        _report_counts(evaluation, scorer.max_length, time.monotonic() - start)
        evaluations.append(evaluation)

    output_dir = Path(arguments.output_dir) if arguments.output_dir else default_output_dir(arguments.model)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_scores(output_dir / "scores.jsonl", evaluations)
    page = build_report(arguments.model, evaluations)
    (output_dir / "report.html").write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    (output_dir / "results.json").write_text(json.dumps(results(arguments.model, evaluations), indent=2) + "\n")
    print(f"written: {output_dir}/results.json, scores.jsonl, report.html\n", file=sys.stderr)
    return evaluations


def _report_counts(evaluation: Evaluation, max_length: int, seconds: float) -> None:
    counts, name = evaluation.counts, evaluation.benchmark.name
    print(f"{name}: {counts['responses']} responses in {seconds:.1f} s", file=sys.stderr)
    for message in counts["skipped_rows"][:MESSAGES_SHOWN]:
        print(f"skipped: {message}", file=sys.stderr)
    if counts["skipped"]:
        print(f"{name}: {counts['skipped']} of {counts['rows']} rows skipped", file=sys.stderr)
    if counts["truncated"]:
        print(
            f"{name}: {counts['truncated']} conversations longer than {max_length} tokens lost the left end of their "
            f"prompt; in {counts['responses_cut']} of them the response lost its beginning too",
            file=sys.stderr,
        )
    if counts["empty_responses"]:
        print(f"{name}: {counts['empty_responses']} responses are empty, and were rewarded as such", file=sys.stderr)
    if counts["tied_pairs"]:
        print(f"{name}: {counts['tied_pairs']} of {counts['pairs']} pairs tied", file=sys.stderr)
    if counts["counted"] < counts["scored"]:
        print(f"{name}: {counts['scored'] - counts['counted']} rows cannot count without another row", file=sys.stderr)
    for subset, rows in counts["short_subsets"].items():
        print(f"{name}: {subset} has {rows} rows; averages are over what is there", file=sys.stderr)


def main() -> None:
    arguments = parse_stage_args(EvalArguments, DEFAULT_CONFIG, __doc__)
    try:
        evaluations = run(arguments)
    except InputError as fault:
        sys.exit(f"error: {fault}")
    tables = []
    for evaluation in evaluations:
        counts = evaluation.counts
        rows = f"{counts['counted']} of {counts['rows']} rows, {counts['pairs']} pairs"
        tables.append(accuracy_table(evaluation.benchmark.name, evaluation.summary, rows))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
