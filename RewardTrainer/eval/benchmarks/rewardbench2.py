"""RewardBench 2 (allenai/reward-bench-2, split `test`, 1865 rows in six subsets).

Row: id, prompt, chosen and rejected (lists of strings), subset. Outside Ties one right response stands against three:
1/k where it shares the maximum with k responses. In Ties (ids `tied:N` and `ref:N`) a prompt with several right
responses goes with a reference prompt that has one; see `metrics.ties_credit`. Overall is the mean of the six subsets.

A judge chooses among four responses shown at once (a tie or an unreadable reply is worth 1/4); Ties needs ratings,
which are scores, so that verdicts say nothing about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark, Item, Metric, Scores, Verdict
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import Means, Sizes, mean
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.metrics import NAN, TIES_WEIGHTS, best_of_all, ties_credit
from RewardTrainer.eval.verdict_metrics import choice_of_all

HUB = "allenai/reward-bench-2"
TIES = "Ties"
SIZES = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, TIES: 102}


@register("rewardbench2")
def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError where there is no data."""
    found = files.local_files(data_dir, "rewardbench2", "reward-bench-2")
    rows = [row for path in found for row in files.file_rows(path)]
    if not found:
        rows = files.hub_rows(HUB, "test", "Or put its file into <data_dir>/rewardbench2/.")
    items, skipped = files.collect(rows, make_item)
    source = str(found[0].parent) if found else HUB
    by_scores, by_verdicts = Metric(credits, combine), Metric(verdict_credits, combine)
    return Benchmark("rewardbench2", source, items, skipped, by_scores, by_verdicts, SIZES)


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    right, wrong = files.texts(row, "chosen"), files.texts(row, "rejected")
    identifier = files.name_of(row, "id")
    named = files.text(row, "subset")
    subset = TIES if named.lower() == TIES.lower() else files.subset(row, "subset", SIZES)
    cluster = ""
    if subset == TIES:
        kind, _, cluster = identifier.partition(":")
        if kind not in ("ref", "tied") or not cluster:
            raise InputError(f"field `id` of a Ties row must be ref:N or tied:N, not {identifier!r}")
    elif len(right) != 1:
        raise InputError(f"field `chosen` must hold one response outside Ties, not {len(right)}")
    chosen = tuple(range(len(right)))
    return Item(identifier, subset, files.prompt(row, "prompt"), (*right, *wrong), chosen, where, cluster=cluster)


def credits(items: Sequence[Item], scores: Sequence[Scores]) -> np.ndarray:
    """Values (rows, 1). The two rows of a Ties prompt both carry the prompt's whole score, so that the mean over the
    rows is the subset's; a prompt with one of its two rows missing or null cannot count."""
    values = np.full((len(items), 1), NAN)
    plain = [index for index, item in enumerate(items) if item.subset != TIES]
    values[plain] = best_of_all([items[i] for i in plain], [scores[i] for i in plain])
    ties: dict[str, dict[str, int]] = {}
    for index, item in enumerate(items):
        if item.subset == TIES and None not in scores[index]:
            ties.setdefault(item.cluster, {})[item.id.partition(":")[0]] = index
    for rows in ties.values():
        if len(rows) == 2:
            ref, tied = rows["ref"], rows["tied"]
            terms = ties_credit(scores[ref], len(items[ref].chosen), scores[tied], len(items[tied].chosen))
            values[[ref, tied]] = sum(weight * term for weight, term in zip(TIES_WEIGHTS, terms, strict=True))
    return values


def verdict_credits(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """Values (rows, 1), NaN in Ties."""
    values = choice_of_all(items, verdicts)
    values[[item.subset == TIES for item in items]] = NAN
    return values


def combine(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
    """The plain mean of the subsets."""
    return {}, mean([row["accuracy"] for row in means.values()])
