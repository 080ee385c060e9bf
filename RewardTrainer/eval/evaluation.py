"""One reward model on one benchmark: score every response, count what happened, write it down."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from distiller.records import InputError, dump_line
from RewardTrainer.eval.base import Benchmark, Item
from RewardTrainer.eval.confidence import intervals
from RewardTrainer.eval.engines.base import Engine, score_each_once
from RewardTrainer.eval.parts import Finished, Parts, Scored, rows_of_shard


@dataclass(frozen=True)
class Evaluation:
    """A benchmark with its rewards."""

    benchmark: Benchmark
    items: list[Item]
    """The scored ones, in file order."""
    scores: list[list[float]]
    """Rewards of each item's responses."""
    values: np.ndarray
    """What each row is worth, (rows, columns) of the benchmark's metric."""
    summary: dict
    """subsets, averages, overall."""
    intervals: dict
    """95 % bootstrap intervals of the same; see `confidence.intervals`."""
    counts: dict
    """rows, scored, counted, skipped, skipped_rows (messages), responses, empty_responses, truncated, responses_cut,
    pairs, tied_pairs, short_subsets. The two on truncation are None where the engine does not say."""


def evaluation_of(benchmark: Benchmark, items: list[Item], scores: list[list[float]], counts: dict) -> Evaluation:
    """A benchmark's numbers from the scores of its rows.

    Args:
        benchmark: the benchmark
        items: those of its rows that were scored
        scores: rewards of each item's responses
        counts: see `Evaluation.counts`; "counted" is filled in here
    """
    values = benchmark.by_scores.rows(items, scores)
    summary = benchmark.summarize(items, scores)
    counts = {**counts, "counted": sum(row["n"] for row in summary["subsets"].values())}
    return Evaluation(benchmark, items, scores, values, summary, intervals(benchmark.by_scores, items, values), counts)


def score_benchmark(
    benchmark: Benchmark,
    engine: Engine,
    parts: Parts | None = None,
    shard: tuple[int, int] = (0, 1),
    bar: bool = False,
) -> Finished:
    """Reward every response of a benchmark that has no reward yet.

    Args:
        benchmark: its rows
        engine: the reward model
        parts: where rewards are kept as they come, and found again; None keeps them in memory alone
        shard: (this process's number, number of processes): the rows are split between them
        bar: show a progress bar on stderr

    Returns:
        all that is known now, other processes' rewards included as far as they were there at the start

    Raises:
        InputError: the model's rewards are unusable
    """
    done = parts.finished(benchmark.name) if parts else Finished({}, {})
    mine = [benchmark.items[index] for index in rows_of_shard(benchmark, *shard)]
    todo = [(item, [n for n in range(len(item.responses)) if (item.key, n) not in done.scores]) for item in mine]
    todo = [(item, numbers) for item, numbers in todo if numbers and item.key not in done.refused]
    encoded = engine.encode(
        [[[*item.prompt, _answer(item.responses[number])] for number in numbers] for item, numbers in todo]
    )
    rows, work = [], []
    for (item, numbers), row in zip(todo, encoded, strict=True):
        if isinstance(row, InputError):
            done.refused[item.key] = str(row)
            if parts:
                parts.refuse(benchmark.name, item.key, str(row))
        else:
            rows.append(row)
            work.append((item, numbers))
    total = sum(map(len, rows))
    with tqdm(total=total, desc=benchmark.name, unit="response", file=sys.stderr, disable=not bar) as progress:
        for row, index, reward in score_each_once(engine, rows):
            item, numbers = work[row]
            scored = Scored(reward, rows[row][index].truncated, rows[row][index].response_cut)
            done.scores[item.key, numbers[index]] = scored
            if parts:
                parts.add(benchmark.name, item.key, numbers[index], scored)
            progress.update()
    return done


def make_evaluation(benchmark: Benchmark, done: Finished) -> Evaluation:
    """The benchmark's numbers from its rewards.

    A row whose conversation the chat template refuses is skipped as a whole, counted, and named.

    Raises:
        InputError: no row could be scored, or rewards are missing
    """
    skipped = [
        *benchmark.skipped,
        *(f"{item.where}: {done.refused[item.key]}" for item in benchmark.items if item.key in done.refused),
    ]
    items = [item for item in benchmark.items if item.key not in done.refused]
    if not items:
        reasons = "\n  ".join(skipped[:5]) or "the file is empty"
        raise InputError(f"{benchmark.source}: no row can be scored:\n  {reasons}")
    rewarded = [[done.scores.get((item.key, number)) for number in range(len(item.responses))] for item in items]
    missing = sum(scored is None for row in rewarded for scored in row)
    if missing:
        raise InputError(f"{benchmark.name}: {missing} responses have no reward yet; run the same command again")
    scores = [[scored.score for scored in row] for row in rewarded]
    gaps = pair_gaps(items, scores)
    flat = [scored for row in rewarded for scored in row]
    counts = {
        "rows": len(items) + len(skipped),
        "scored": len(items),
        "skipped": len(skipped),
        "skipped_rows": skipped,
        "responses": len(flat),
        "empty_responses": sum(not response.strip() for item in items for response in item.responses),
        "truncated": _count(scored.truncated for scored in flat),
        "responses_cut": _count(scored.response_cut for scored in flat),
        "pairs": len(gaps),
        "tied_pairs": sum(gap == 0 for gap in gaps),
        "short_subsets": benchmark.short_subsets(items),
    }
    return evaluation_of(benchmark, items, scores, counts)


def evaluate(benchmark: Benchmark, engine: Engine) -> Evaluation:
    """Score a benchmark in memory. Raises InputError as the two functions it is made of."""
    return make_evaluation(benchmark, score_benchmark(benchmark, engine))


def _count(flags: Iterable[bool | None]) -> int | None:
    """How many; None where one of them is not known."""
    known = list(flags)
    return None if None in known else sum(known)


def _answer(response: str) -> dict[str, str]:
    return {"role": "assistant", "content": response}


def pair_gaps(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> list[float]:
    """Right minus wrong reward, for every pair of every item."""
    return [row[right] - row[wrong] for item, row in zip(items, scores, strict=True) for right, wrong in item.pairs()]


def results(model: str, evaluations: Sequence[Evaluation], settings: dict) -> dict:
    """The content of `results.json`; keys may be added, none of these change.

    {"model": name,
     "benchmarks": {name: {"subsets": {subset: {"accuracy", "n", further columns}}, "averages": {name: value},
                           "overall": value, "intervals": {"subsets", "averages", "overall"}}},
     "counts": {name: see `Evaluation.counts`},
     "settings": what the scores were made with}
    """
    return {
        "model": model,
        "benchmarks": {e.benchmark.name: {**e.summary, "intervals": e.intervals} for e in evaluations},
        "counts": {e.benchmark.name: e.counts for e in evaluations},
        "settings": settings,
    }


def score_lines(evaluations: Sequence[Evaluation]) -> bytes:
    """The content of `scores.jsonl`: one line for each response, `response` being its index in the row."""
    lines = []
    for evaluation in evaluations:
        for item, row in zip(evaluation.items, evaluation.scores, strict=True):
            for index, score in enumerate(row):
                line = {"benchmark": evaluation.benchmark.name, "id": item.id, "subset": item.subset}
                lines.append(dump_line({**line, "response": index, "score": score}))
    return b"".join(lines)


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
        cells = [["", *(title(column) for column in names), "n"]]
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
    columns = {title(name): value for name, value in summary["averages"].items()}
    if "Mean" not in columns:
        columns["Overall"] = summary["overall"]
    return columns


def _values(summary: dict) -> list[float | None]:
    return list(average_columns(summary).values())


def title(name: str) -> str:
    """`both_correct` -> `Both correct`."""
    return name[:1].upper() + name[1:].replace("_", " ")


def shown(value: float | None) -> str:
    """Three decimals; a quantity that does not exist is a dash."""
    return "-" if value is None else f"{value:.3f}"
