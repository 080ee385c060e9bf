"""Finished evaluations side by side: `eval_rm.sh --compare ../output/eval/a ../output/eval/b`.

Reads `results.json` and `scores.jsonl` of each output directory and the benchmarks' rows; loads no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.benchmarks import load_benchmark
from RewardTrainer.eval.confidence import paired
from RewardTrainer.eval.evaluation import Evaluation, evaluation_of
from RewardTrainer.eval.outputs import write_json, write_page
from RewardTrainer.eval.report import Comparison, Run
from RewardTrainer.eval.stored import read_scores


def load_run(directory: Path, data_dir: Path | None) -> Run:
    """An evaluation from the files that `eval_rm.sh` wrote.

    Args:
        directory: its output directory
        data_dir: where benchmark files lie; None is where they lay for the evaluation

    Raises:
        InputError: files are missing or damaged, or the benchmark's rows are others than those scored
    """
    path = directory / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        model, names, given = results["model"], list(results["benchmarks"]), results["settings"]["data_dir"]
        counts = {name: results["counts"][name] for name in names}
        skipped = {name: counts[name]["skipped"] for name in names}
        digests = results["settings"].get("rows", {})
    except OSError as fault:
        raise InputError(
            f"{path}: cannot be read ({fault.strerror}); give output directories of eval_rm.sh"
        ) from fault
    except (ValueError, KeyError, TypeError) as fault:
        raise InputError(f"{path}: no results of eval_rm.sh ({fault!r}); evaluate the model again") from fault
    data_dir = data_dir or (Path(given) if given else None)
    evaluations: list[Evaluation] = []
    for name in names:
        benchmark = load_benchmark(name, data_dir)
        if name in digests and digests[name] != benchmark.digest:
            raise InputError(
                f"{directory}: {benchmark.source} is not what was evaluated (texts or labels of {name} have changed). "
                "Give the --data_dir of the evaluation, or evaluate again"
            )
        stored = read_scores(directory / "scores.jsonl", name, benchmark.items)
        refused = skipped[name] - len(benchmark.skipped)
        if stored.unknown or len(stored.missing) != refused:
            raise InputError(
                f"{directory / 'scores.jsonl'}: {len(stored.missing)} rows of {name} have no scores there and "
                f"{stored.unknown} scores have no row; {benchmark.source} is not what was evaluated. Give the "
                "--data_dir of the evaluation, or evaluate again"
            )
        if any(score is None for row in stored.said for score in row):
            raise InputError(f"{directory / 'scores.jsonl'}: a score of {name} is null; evaluate the model again")
        evaluations.append(evaluation_of(benchmark, stored.items, stored.said, counts[name]))
    return Run(model, evaluations)


def compare_runs(runs: Sequence[Run]) -> list[Comparison]:
    """The first model against each other one, on every benchmark both have."""
    comparisons = []
    first, *others = runs
    for other in others:
        for mine in first.evaluations:
            name = mine.benchmark.name
            theirs = other.on(name)
            if theirs is None:
                continue
            places = {item.key: index for index, item in enumerate(theirs.items)}
            both = [(index, places[item.key]) for index, item in enumerate(mine.items) if item.key in places]
            items = [mine.items[index] for index, _ in both]
            values = mine.values[[i for i, _ in both]], theirs.values[[i for _, i in both]]
            result = paired(mine.benchmark.by_scores, items, *values) if both else None
            if result:
                comparisons.append(Comparison(name, first.model, other.model, result))
    return comparisons


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Plain text, a line a test."""
    lines = []
    for c in comparisons:
        (first, second), (low, high) = c.paired.overall, c.paired.interval
        lines.append(
            f"{c.benchmark}: {c.first} {first:.3f}, {c.second} {second:.3f}; the second minus the first "
            f"{c.paired.difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {c.paired.p_value:.4f} ({c.paired.rows} rows)"
        )
    return "\n".join(lines)


def run_comparison(directories: Sequence[Path], data_dir: Path | None, output_dir: Path | None) -> str:
    """Write `report.html`, `results.md` and `comparison.json` of finished evaluations; returns the table to print.

    Args:
        directories: output directories of `eval_rm.sh`, two or more
        data_dir: see `load_run`
        output_dir: where to write; None is `../output/eval/<their names>`

    Raises:
        InputError: files are missing, or the first run has no benchmark in common with another
    """
    if len(set(directories)) < 2 or len(set(directories)) < len(directories):
        raise InputError("--compare wants two or more different output directories of eval_rm.sh")
    runs = [load_run(directory, data_dir) for directory in directories]
    if len({run.model for run in runs}) < len(runs):  # one model, evaluated in several ways
        named = zip(runs, directories, strict=True)
        runs = [Run(f"{run.model} ({directory})", run.evaluations) for run, directory in named]
    comparisons = compare_runs(runs)
    if not comparisons:
        raise InputError("--compare: these evaluations have no benchmark in common")
    output_dir = output_dir or Path("../output/eval") / "-and-".join(directory.name for directory in directories)
    write_page(output_dir, runs, comparisons)
    tests = [{"benchmark": c.benchmark, "first": c.first, "second": c.second, **asdict(c.paired)} for c in comparisons]
    write_json(output_dir / "comparison.json", {"models": [run.model for run in runs], "comparisons": tests})
    print(f"written: {output_dir}/report.html, results.md, comparison.json\n", file=sys.stderr)
    return comparison_table(comparisons)
