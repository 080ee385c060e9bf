"""What the ratings of a judge that sees one response at a time are worth: one rule for a run and for `rescore`.

Ratings are scores like a reward model's, with its metric, where a row has more than two responses (the RM-Bench
matrix, best of n) or the benchmark's rule for ratings is one over scores. Otherwise they decide the pair, and the
metric is the one of verdicts, with its rule for ties.

A rating that could not be read is null. It leaves its row in: as a verdict it is an unreadable one; over scores each
comparison it takes part in is not won, as the strict rule has it for a tie, and the others stay. Only the Ties of
RewardBench 2, which measure distances, leave such a row out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import numpy as np

from RewardTrainer.eval.base import Benchmark, Item, Metric, Scores
from RewardTrainer.eval.benchmarks.rewardbench2 import TIES
from RewardTrainer.eval.judge.bias import verdicts_of_ratings

BY_RATING = frozenset({"llmbar"})
"""Benchmarks of pairs whose official rule for ratings is one over scores, that for null ones included."""


def rates(benchmark: Benchmark) -> bool:
    """Whether ratings count by the benchmark's metric over scores."""
    return benchmark.name in BY_RATING or any(len(item.responses) > 2 for item in benchmark.items)


def rating_metric(benchmark: Benchmark) -> Metric:
    """The metric over the ratings of each row."""
    if not rates(benchmark):
        metric = benchmark.by_verdicts

        def of_verdicts(items: Sequence[Item], ratings: Sequence[Scores]) -> np.ndarray:
            return metric.rows(items, [verdicts_of_ratings(i, row) for i, row in zip(items, ratings, strict=True)])

        return replace(metric, rows=of_verdicts)
    metric = benchmark.by_scores
    if benchmark.name in BY_RATING:
        return metric

    def of_scores(items: Sequence[Item], ratings: Sequence[Scores]) -> np.ndarray:
        return metric.rows(items, [never_winning(item, row) for item, row in zip(items, ratings, strict=True)])

    return replace(metric, rows=of_scores)


def never_winning(item: Item, row: Scores) -> Scores:
    """The row with a null of a right response under, and of a wrong one over, everything."""
    if item.subset == TIES:
        return row
    return [score if score is not None else -inf if index in item.chosen else inf for index, score in enumerate(row)]
