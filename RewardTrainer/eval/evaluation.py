"""One reward model on one benchmark: score every response, count what happened, write it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distiller.records import InputError, dump_line
from RewardTrainer.eval.base import Benchmark, Item

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
    """rows, scored, counted, skipped, skipped_rows (messages), responses, empty_responses, truncated, responses_cut,
    pairs, tied_pairs, short_subsets."""


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
    summary = benchmark.summarize(items, scores)
    counts = {
        "rows": len(items) + len(skipped),
        "scored": len(items),
        "counted": sum(row["n"] for row in summary["subsets"].values()),
        "skipped": len(skipped),
        "skipped_rows": skipped,
        "responses": len(encoded),
        "empty_responses": sum(not response.strip() for item in items for response in item.responses),
        "truncated": sum(row.truncated for row in encoded),
        "responses_cut": sum(row.response_cut for row in encoded),
        "pairs": len(gaps),
        "tied_pairs": sum(gap == 0 for gap in gaps),
        "short_subsets": benchmark.short_subsets(items),
    }
    return Evaluation(benchmark, items, scores, summary, counts)


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


def accuracy_table(name: str, summary: dict, rows: str) -> str:
    """A benchmark's numbers as plain text: its averages in one row, then its subsets if there is more than one.

    Args:
        name: the benchmark's
        summary: subsets, averages, overall
        rows: what was counted, for the first line
    """
    lines = [f"{name}: {rows}", *_columns([list(average_columns(summary)), [*map(shown, _values(summary))]])]
    subsets = summary["subsets"]
    if len(subsets) > 1:
        names = [column for column in next(iter(subsets.values())) if column != "n"]
        cells = [["", *(_title(column) for column in names), "n"]]
        cells += [
            [subset, *(shown(row[column]) for column in names), str(row["n"])] for subset, row in subsets.items()
        ]
        lines += _columns(cells)
    return "\n".join(lines)


def _columns(rows: list[list[str]]) -> list[str]:
    """Cells right-aligned under each other (the first one left, where the header has none)."""
    widths = [max(7, *(len(row[index]) for row in rows)) for index in range(len(rows[0]))]
    first_left = not rows[0][0]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if first_left and index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def average_columns(summary: dict) -> dict[str, float | None]:
    """Column title -> value: the averages, and the overall figure unless an average called mean already is it."""
    columns = {_title(name): value for name, value in summary["averages"].items()}
    if "Mean" not in columns:
        columns["Overall"] = summary["overall"]
    return columns


def _values(summary: dict) -> list[float | None]:
    return list(average_columns(summary).values())


def _title(name: str) -> str:
    return name[:1].upper() + name[1:].replace("_", " ")


def shown(value: float | None) -> str:
    """Three decimals; a quantity that does not exist is a dash."""
    return "-" if value is None else f"{value:.3f}"
