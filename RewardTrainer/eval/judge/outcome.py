"""From the files of the stage to the judge's results: verdicts and ratings, the benchmark's own metric over them, and
what they say about the judge.

A reply that cannot be read is a verdict of null, worth what the benchmark's rule says of one. An ask that was refused
(an over-long prompt, HTTP 400) got no reply: it has no verdict, and its row cannot count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from distiller.atomic import write_whole
from distiller.records import InputError, dump_line
from RewardTrainer.eval.base import TIE, Benchmark, Item, Metric, Verdict, summarize
from RewardTrainer.eval.confidence import intervals
from RewardTrainer.eval.judge.bias import Judged, Value, judge_statistics, rating_statistics, verdicts_of_ratings
from RewardTrainer.eval.judge.ratings import rating_metric
from RewardTrainer.eval.judge.replies import POINTWISE


@dataclass
class Outcome:
    """A judge on one benchmark."""

    benchmark: Benchmark
    items: list[Item]
    """Those that count, with something said about each."""
    judged: list[list[Judged]]
    """The verdicts on each; empty lists for a judge that rates one response at a time."""
    summary: dict
    """subsets, averages, overall: see `base.summarize`."""
    intervals: dict
    """95 % bootstrap intervals of the same; see `confidence.intervals`."""
    statistics: dict[str, Value]
    """See `bias.judge_statistics` and `bias.rating_statistics`."""
    counts: dict
    """rows, counted, skipped, skipped_rows (messages), asks, answered, unreadable, refused, refused_asks (messages),
    not_run, rows_without_ask, short_subsets."""
    verdict_lines: list[dict] = field(default_factory=list)
    score_lines: list[dict] = field(default_factory=list)


Replies = Mapping[str, dict]
"""id -> the stage's row: `raw`, and `verdict` or `score` where it could be read, `reason` where not."""


def stage_rows(output: str | Path) -> tuple[Replies, Replies]:
    """(finished, failed) rows of a stage by id. Raises InputError."""
    return tuple({row["id"]: row for row in _lines(Path(f"{output}{suffix}"))} for suffix in ("", ".failed.jsonl"))


def _lines(path: Path) -> Iterator[dict]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as fault:
                raise InputError(f"{path}, line {number}: not a row that a stage wrote; use --overwrite") from fault


def outcome_of(
    benchmark: Benchmark, items: Sequence[Item], asks: Sequence[dict], done: Replies, failed: Replies, form: str
) -> Outcome:
    """The results on one benchmark.

    Args:
        benchmark: where the items are from
        items: the rows asked about
        asks: the stage's rows about them
        done, failed: what became of those
        form: of the prompt
    """
    by_key = {item.key: item for item in items}
    refused, not_run = [], 0
    said: dict[tuple[str, str], dict[tuple[int, ...], dict]] = {item.key: {} for item in items}
    for ask in asks:
        key, order = (ask["subset"], ask["item"]), tuple(ask["order"])
        reply = done.get(ask["id"]) or failed.get(ask["id"])
        if reply is None:
            not_run += 1
        elif ask["id"] not in done and reply.get("raw") is None:
            refused.append(f"{by_key[key].where}, order {list(order)}: {reply['reason']}")
        else:
            said[key][order] = reply
    if form == POINTWISE:
        outcome = _rated(benchmark, items, said)
    else:
        # One of two orders alone would count the place a response was shown in.
        asked = Counter((ask["subset"], ask["item"]) for ask in asks)
        whole = {key: replies if len(replies) == asked[key] else {} for key, replies in said.items()}
        outcome = _compared(benchmark, items, whole)
    outcome.counts = {
        "rows": len(items) + len(benchmark.skipped),
        "counted": sum(row["n"] for row in outcome.summary["subsets"].values()),
        "skipped": len(benchmark.skipped),
        "skipped_rows": benchmark.skipped,
        "asks": len(asks),
        "answered": sum(len(row) for row in said.values()),
        "unreadable": outcome.statistics["unreadable"],
        "refused": len(refused),
        "refused_asks": refused,
        "not_run": not_run,
        "rows_without_ask": len(items) - len({(ask["subset"], ask["item"]) for ask in asks}),
        "short_subsets": benchmark.short_subsets(items),
    }
    return outcome


def _compared(benchmark: Benchmark, items: Sequence[Item], said: Mapping) -> Outcome:
    kept = [item for item in items if said[item.key]]
    judged = [[_judged(order, reply) for order, reply in said[item.key].items()] for item in kept]
    lines = [
        {
            **_place(benchmark, item),
            "order": list(each.verdict.order),
            "verdict": _word(each.verdict),
            **({"scores": list(each.scores)} if each.scores else {}),
            "raw": each.raw,
        }
        for item, row in zip(kept, judged, strict=True)
        for each in row
    ]
    verdicts = [[each.verdict for each in row] for row in judged]
    numbers = _numbers(benchmark.by_verdicts, kept, verdicts)
    return Outcome(benchmark, kept, judged, *numbers, judge_statistics(kept, judged), {}, lines)


def _numbers(metric: Metric, items: Sequence[Item], said: Sequence) -> tuple[dict, dict]:
    """What `Outcome` calls summary and intervals."""
    return summarize(metric, items, said), intervals(metric, items, metric.rows(items, said))


def _rated(benchmark: Benchmark, items: Sequence[Item], said: Mapping) -> Outcome:
    """See `ratings`."""
    kept = [item for item in items if len(said[item.key]) == len(item.responses)]
    replies = [[said[item.key][index,] for index in range(len(item.responses))] for item in kept]
    scores = [[reply.get("score") for reply in row] for row in replies]
    score_lines = [
        {**_place(benchmark, item), "response": index, "score": reply.get("score"), "raw": reply["raw"]}
        for item in items
        for (index,), reply in said[item.key].items()
    ]
    verdicts = [verdicts_of_ratings(item, row) for item, row in zip(kept, scores, strict=True)]
    verdict_lines = [
        {
            **_place(benchmark, item),
            "order": list(verdict.order),
            "verdict": _word(verdict),
            "ratings": [row[index] for index in verdict.order],
            "raw": None,
        }
        for item, row, said_of in zip(kept, scores, verdicts, strict=True)
        for verdict in said_of
    ]
    numbers = _numbers(rating_metric(benchmark), kept, scores)
    statistics = rating_statistics(kept, scores)
    return Outcome(benchmark, kept, [[] for _ in kept], *numbers, statistics, {}, verdict_lines, score_lines)


def _judged(order: tuple[int, ...], reply: dict) -> Judged:
    word = reply.get("verdict")
    winner = word if word in (None, TIE) else order[ascii_uppercase.index(word)]
    scores = reply.get("scores")
    return Judged(Verdict(order, winner), reply["raw"], tuple(scores) if scores else None)


def _word(verdict: Verdict) -> str | None:
    """As `stored.py` has it: the letter of the winner in the order shown."""
    if verdict.winner in (None, TIE):
        return verdict.winner
    return ascii_uppercase[verdict.order.index(verdict.winner)]


def _place(benchmark: Benchmark, item: Item) -> dict:
    return {"benchmark": benchmark.name, "id": item.id, "subset": item.subset}


def results(model: str, judge: Mapping, outcomes: Sequence[Outcome]) -> dict:
    """The content of `results.json`: that of a reward model's, with `judge` (how it was asked) and `judges` (what its
    verdicts say about it) beside it."""
    return {
        "model": model,
        "judge": dict(judge),
        "benchmarks": {o.benchmark.name: {**o.summary, "intervals": o.intervals} for o in outcomes},
        "judges": {outcome.benchmark.name: outcome.statistics for outcome in outcomes},
        "counts": {outcome.benchmark.name: outcome.counts for outcome in outcomes},
    }


def write_outcomes(directory: Path, form: str, model: str, judge: Mapping, outcomes: Sequence[Outcome]) -> list[str]:
    """Write `verdicts.jsonl`, with ratings `scores.jsonl` too, and `results.json`; returns their names."""
    files = {"verdicts.jsonl": [line for outcome in outcomes for line in outcome.verdict_lines]}
    if form == POINTWISE:
        files["scores.jsonl"] = [line for outcome in outcomes for line in outcome.score_lines]
    for name, lines in files.items():
        write_whole(directory / name, b"".join(map(dump_line, lines)))
    text = json.dumps(results(model, judge, outcomes), indent=2) + "\n"
    write_whole(directory / "results.json", text.encode("utf-8"))
    return [*files, "results.json"]
