"""One reward model on one benchmark: score every response, count what happened, write it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distiller.records import InputError, dump_line
from RewardTrainer.eval.benchmarks.base import Benchmark, Item

if TYPE_CHECKING:  # metrics, tables and report need no torch
    from RewardTrainer.eval.scoring import Scorer


@dataclass(frozen=True)
class Evaluation:
    """A benchmark with its rewards."""

    benchmark: Benchmark
    items: list[Item]
    """The scored ones, in file order."""
    scores: list[list[float]]
    """Rewards of each item's responses."""
    summary: dict
    """subsets, averages, overall."""
    counts: dict
    """rows, scored, skipped, skipped_rows (messages), responses, truncated, responses_cut, pairs, tied_pairs."""


def evaluate(benchmark: Benchmark, scorer: Scorer, show_progress: bool = False) -> Evaluation:
    """Score a benchmark.

    A row whose conversation the chat template refuses is skipped as a whole, counted, and named.

    Raises:
        InputError: no row could be scored, or the model's rewards are unusable
    """
    items: list[Item] = []
    skipped = list(benchmark.skipped)
    texts: list[str] = []
    for item in benchmark.items:
        try:
            rendered = [scorer.render([*item.prompt, _answer(response)]) for response in item.responses]
        except InputError as error:
            skipped.append(f"{item.where}: {error}")
            continue
        items.append(item)
        texts.extend(rendered)
    if not items:
        reasons = "\n  ".join(skipped[:5]) or "the file is empty"
        raise InputError(f"{benchmark.source}: no row can be scored:\n  {reasons}")

    encoded = scorer.encode(texts, [response for item in items for response in item.responses])
    rewards = iter(scorer.score([row.ids for row in encoded], progress=benchmark.name if show_progress else None))
    scores = [[next(rewards) for _ in item.responses] for item in items]
    gaps = pair_gaps(items, scores)
    counts = {
        "rows": len(items) + len(skipped),
        "scored": len(items),
        "skipped": len(skipped),
        "skipped_rows": skipped,
        "responses": len(encoded),
        "truncated": sum(row.truncated for row in encoded),
        "responses_cut": sum(row.response_cut for row in encoded),
        "pairs": len(gaps),
        "tied_pairs": sum(gap == 0 for gap in gaps),
    }
    return Evaluation(benchmark, items, scores, benchmark.summarize(items, scores), counts)


def _answer(response: str) -> dict[str, str]:
    return {"role": "assistant", "content": response}


def pair_gaps(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> list[float]:
    """Right minus wrong reward, for every pair of every item."""
    return [row[right] - row[wrong] for item, row in zip(items, scores, strict=True) for right, wrong in item.pairs()]


def results(model: str, evaluations: Sequence[Evaluation]) -> dict:
    """The content of `results.json`."""
    return {
        "model": model,
        "benchmarks": {evaluation.benchmark.name: evaluation.summary for evaluation in evaluations},
        "counts": {evaluation.benchmark.name: evaluation.counts for evaluation in evaluations},
    }


def write_scores(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """`scores.jsonl`: one line for each response, `response` being its index in the row."""
    with path.open("wb") as file:
        for evaluation in evaluations:
            for item, row in zip(evaluation.items, evaluation.scores, strict=True):
                for index, score in enumerate(row):
                    line = {
                        "benchmark": evaluation.benchmark.name,
                        "id": item.id,
                        "subset": item.subset,
                        "response": index,
                        "score": score,
                    }
                    file.write(dump_line(line))


def accuracy_table(evaluation: Evaluation) -> str:
    """The benchmark's numbers as plain text: its averages in one row, then its subsets if there is more than one."""
    counts = evaluation.counts
    lines = [f"{evaluation.benchmark.name}: {counts['scored']} of {counts['rows']} rows, {counts['pairs']} pairs"]
    columns = average_columns(evaluation.summary)
    widths = [max(len(name), 7) for name in columns]
    lines.append("  " + "  ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)))
    values = columns.values()
    lines.append("  " + "  ".join(shown(value).rjust(width) for value, width in zip(values, widths, strict=True)))
    subsets = evaluation.summary["subsets"]
    if len(subsets) > 1:
        width = max(len(name) for name in subsets)
        lines += [f"  {name.ljust(width)}  {shown(row['accuracy'])}  n={row['n']}" for name, row in subsets.items()]
    return "\n".join(lines)


def average_columns(summary: dict) -> dict[str, float | None]:
    """Column title -> value: the averages, and the overall figure unless an average called mean already is it."""
    columns = {name.replace("_", " ").capitalize(): value for name, value in summary["averages"].items()}
    if "Mean" not in columns:
        columns["Overall"] = summary["overall"]
    return columns


def shown(value: float | None) -> str:
    """Three decimals; a quantity that does not exist is a dash."""
    return "-" if value is None else f"{value:.3f}"
