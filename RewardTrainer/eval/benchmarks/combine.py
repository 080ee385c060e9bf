"""How subset means become averages and an overall figure, for the benchmarks that share a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from RewardTrainer.eval.base import Metric
from RewardTrainer.eval.metrics import all_pairs_strict
from RewardTrainer.eval.verdict_metrics import mean_pair_credit

Means = Mapping[str, Mapping[str, float]]
Sizes = Mapping[str, int]


def pooled(means: Means, sizes: Sizes, column: str = "accuracy", names: Sequence[str] | None = None) -> float:
    """Mean over all rows of the named subsets (all by default), whatever their subset."""
    names = list(means) if names is None else names
    return sum(means[name][column] * sizes[name] for name in names) / sum(sizes[name] for name in names)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def over_rows(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
    """Overall is the mean over all rows; the mean of the subsets, where there are several, stands beside it."""
    averages = {"mean_of_subsets": mean([row["accuracy"] for row in means.values()])} if len(means) > 1 else {}
    return averages, pooled(means, sizes)


def grouped(
    groups: Callable[[str], str], overall: Callable[[dict[str, float]], float] = lambda cells: mean([*cells.values()])
) -> Callable[[Means, Sizes], tuple[dict[str, float], float]]:
    """Averages are the row means of groups of subsets (`groups` names the group of a subset); overall is their plain
    mean unless given."""

    def combine(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
        members: dict[str, list[str]] = {}
        for name in means:
            members.setdefault(groups(name), []).append(name)
        cells = {group: pooled(means, sizes, names=names) for group, names in members.items()}
        return cells, overall(cells)

    return combine


STRICT = Metric(all_pairs_strict, over_rows)
"""A row is right when its right responses are strictly above its wrong ones."""
PAIR_VERDICTS = Metric(mean_pair_credit, over_rows)
"""A pair is worth the mean over its orders of 1, 0.5 (tie, unreadable) or 0."""
