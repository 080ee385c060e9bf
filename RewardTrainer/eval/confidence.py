"""How sure the numbers are: bootstrap intervals, and paired tests between two models. numpy alone.

Rows are resampled within each subset, as many as it has, so that a benchmark keeps its shape. Rows that only make
sense together (`Item.cluster`) are resampled together. Averages are recomputed from the resampled subset means by the
benchmark's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from RewardTrainer.eval.base import Item, Metric

Interval = tuple[float, float]
REPLICATES = 1000
PERMUTATIONS = 5000
LEVEL = 0.95
MOST_DRAWN = 1 << 22
"""Random numbers held at a time: 32 MB, however many rows a benchmark has."""


@dataclass(frozen=True)
class Units:
    """What is resampled, of one subset: single rows, or clusters of them."""

    sums: np.ndarray
    """Values added up over a unit's rows, (units, columns)."""
    sizes: np.ndarray
    """Rows of each unit, (units,)."""


def units_by_subset(items: Sequence[Item], values: np.ndarray) -> dict[str, Units]:
    """The units of each subset, over the rows that count (no NaN).

    Args:
        items: the rows
        values: their values, (rows, columns)
    """
    members: dict[str, dict[tuple, list[int]]] = {}
    for index, item in enumerate(items):
        if not np.isnan(values[index]).any():
            unit = (item.cluster,) if item.cluster else ("", index)
            members.setdefault(item.subset, {}).setdefault(unit, []).append(index)
    return {
        subset: Units(
            np.array([values[rows].sum(axis=0) for rows in clusters.values()]),
            np.array([len(rows) for rows in clusters.values()]),
        )
        for subset, clusters in members.items()
    }


def intervals(metric: Metric, items: Sequence[Item], values: np.ndarray, seed: int = 0) -> dict:
    """95 % percentile intervals of a benchmark's numbers.

    Returns:
        {"subsets": {name: [low, high]}, "averages": {name: [low, high]}, "overall": [low, high]}; averages that are no
        function of subset means are not among them, and "overall" is None where there is no overall figure
    """
    units = units_by_subset(items, values)
    draw = np.random.default_rng(seed)
    means = {subset: _resampled_means(draw, part.sums, part.sizes) for subset, part in units.items()}
    averages, overall = _combined(metric, units, means)
    return {
        "subsets": {subset: _interval(part[:, 0]) for subset, part in means.items()},
        "averages": {name: _interval(part) for name, part in averages.items()},
        "overall": None if overall is None else _interval(overall),
    }


@dataclass(frozen=True)
class Paired:
    """One model against another, on the rows that count for both."""

    rows: int
    overall: tuple[float, float]
    """Of the first and of the second, on these rows."""
    difference: float
    """second - first, of the overall figure."""
    interval: Interval
    """95 % interval of the difference, rows resampled for both at once."""
    p_value: float
    """Two-sided, of a permutation test that exchanges the two models' answers row by row."""


def paired(
    metric: Metric, items: Sequence[Item], first: np.ndarray, second: np.ndarray, seed: int = 0
) -> Paired | None:
    """Compare the overall figures of two models.

    Args:
        metric: the benchmark's
        items: rows that both have scores for
        first, second: the values of the two models on them, (rows, columns)

    Returns:
        None where no row counts for both, or the benchmark has no overall figure
    """
    both = ~(np.isnan(first).any(axis=1) | np.isnan(second).any(axis=1))
    items = [item for item, counts in zip(items, both, strict=True) if counts]
    if not items:
        return None
    a, b = units_by_subset(items, first[both]), units_by_subset(items, second[both])
    observed = [_combined(metric, x, {s: _plain_mean(part) for s, part in x.items()})[1] for x in (a, b)]
    if observed[0] is None:
        return None
    difference = float(observed[1][0] - observed[0][0])
    draw = np.random.default_rng(seed)

    resampled: list[dict[str, np.ndarray]] = [{}, {}]
    exchanged: list[dict[str, np.ndarray]] = [{}, {}]
    for subset, part in a.items():
        both_means = _resampled_means(draw, np.hstack([part.sums, b[subset].sums]), part.sizes)
        resampled[0][subset], resampled[1][subset] = np.hsplit(both_means, 2)
        gain = b[subset].sums - part.sums  # (units, columns)
        moved = np.concatenate(
            [draw.integers(0, 2, size=(count, len(gain))) @ gain for count in _blocks(PERMUTATIONS, len(gain))]
        )  # (permutations, columns)
        rows = part.sizes.sum()
        for side, own, sign in ((0, part, 1), (1, b[subset], -1)):
            exchanged[side][subset] = (own.sums.sum(axis=0) + sign * moved) / rows
    boot = _combined(metric, b, resampled[1])[1] - _combined(metric, a, resampled[0])[1]
    permuted = _combined(metric, b, exchanged[1])[1] - _combined(metric, a, exchanged[0])[1]
    extreme = int((np.abs(permuted) >= abs(difference) - 1e-12).sum())
    return Paired(
        rows=len(items),
        overall=(float(observed[0][0]), float(observed[1][0])),
        difference=difference,
        interval=_interval(boot),
        p_value=(1 + extreme) / (1 + PERMUTATIONS),
    )


def _resampled_means(draw: np.random.Generator, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Means over rows of as many units as there are, drawn with replacement, (replicates, columns)."""
    even = np.full(len(sizes), 1 / len(sizes))
    means = []
    for count in _blocks(REPLICATES, len(sizes)):
        times = draw.multinomial(len(sizes), even, size=count)  # (count, units)
        means.append((times @ sums) / (times @ sizes)[:, None])
    return np.concatenate(means)


def _blocks(total: int, width: int) -> list[int]:
    """`total` split into parts, each of which times `width` stays under `MOST_DRAWN` (or is 1)."""
    size = max(1, MOST_DRAWN // width)
    return [min(size, total - start) for start in range(0, total, size)]


def _plain_mean(part: Units) -> np.ndarray:
    return part.sums.sum(axis=0, keepdims=True) / part.sizes.sum()  # (1, columns)


def _combined(
    metric: Metric, units: dict[str, Units], means: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The benchmark's averages and overall figure for each replicate of its subset means, (replicates,) each."""
    sizes = {subset: int(part.sizes.sum()) for subset, part in units.items()}
    rows = [
        metric.combine(
            {subset: dict(zip(metric.columns, part[r].tolist(), strict=True)) for subset, part in means.items()}, sizes
        )
        for r in range(len(next(iter(means.values()), ())))
    ]
    if not rows:
        return {}, None
    averages = {name: np.array([row[0][name] for row in rows]) for name in rows[0][0]}
    return averages, None if rows[0][1] is None else np.array([row[1] for row in rows])


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bins_of(values: np.ndarray, count: int) -> list[np.ndarray]:
    """Indices in `count` groups of equal size (to one), ascending by value; fewer groups where there are fewer
    values."""
    order = np.argsort(values, kind="stable")
    return [part for part in np.array_split(order, min(count, len(order))) if len(part)]


def calibration(gaps: Sequence[float], bins: int = 10) -> tuple[list[tuple[float, float, int]], float]:
    """How far a gap, read as Bradley-Terry log-odds, says how often the model is right.

    The model prefers the response with the greater reward, and claims to be right with probability 1 / (1 +
    exp(-|gap|)).

    Args:
        gaps: right minus wrong reward of each pair, (pairs,), not empty

    Returns:
        [(mean claimed probability, share right, pairs), ...] over groups of equal size, and the expected calibration
        error: the mean distance of the two, weighted by pairs
    """
    array = np.asarray(gaps, dtype=float)
    claimed, right = 1 / (1 + np.exp(-np.abs(array))), array > 0
    points = [(float(claimed[i].mean()), float(right[i].mean()), len(i)) for i in bins_of(claimed, bins)]
    error = sum(abs(claim - share) * count for claim, share, count in points) / len(array)
    return points, error


LENGTHS: tuple[tuple[str, Callable[[float], bool]], ...] = (
    ("half or less", lambda ratio: ratio <= 0.5),
    ("shorter", lambda ratio: 0.5 < ratio <= 0.8),
    ("similar", lambda ratio: 0.8 < ratio < 1.25),
    ("longer", lambda ratio: 1.25 <= ratio < 2),
    ("double or more", lambda ratio: ratio >= 2),
)
"""Length of the right response against the wrong one's."""


def accuracy_by_length(pairs: Sequence[tuple[int, int]], gaps: Sequence[float]) -> list[tuple[str, float | None, int]]:
    """[(how long the right response is against the wrong one, share of pairs with a positive gap, pairs), ...].

    Args:
        pairs: characters of the right and of the wrong response
        gaps: right minus wrong reward
    """
    ratios = [max(right, 1) / max(wrong, 1) for right, wrong in pairs]
    table = []
    for name, inside in LENGTHS:
        here = [gap > 0 for ratio, gap in zip(ratios, gaps, strict=True) if inside(ratio)]
        table.append((name, sum(here) / len(here) if here else None, len(here)))
    return table
