"""Intervals and paired tests against what probability theory says, and the curves of the report by hand."""

import math
import random

import numpy as np
import pytest

from RewardTrainer.eval.base import Item, Metric
from RewardTrainer.eval.benchmarks import rewardbench2
from RewardTrainer.eval.benchmarks.combine import STRICT, over_rows
from RewardTrainer.eval.confidence import accuracy_by_length, calibration, intervals, paired


def items(*sizes: int, cluster: int = 1) -> list[Item]:
    """Rows of subsets of these sizes, `cluster` of them together."""
    return [
        Item(f"{n}", f"subset {s}", [], ("a", "b"), (0,), "", cluster=f"{n // cluster}" if cluster > 1 else "")
        for s, size in enumerate(sizes)
        for n in range(size)
    ]


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float).reshape(-1, 1)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    rows = items(400)
    spans = intervals(STRICT, rows, column(*[1.0] * 300, *[0.0] * 100))
    low, high = spans["subsets"]["subset 0"]
    width = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == (pytest.approx(0.75 - width, abs=0.01), pytest.approx(0.75 + width, abs=0.01))
    assert spans["overall"] == (low, high)
    assert spans["averages"] == {}


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = random.Random(3)
    covered = 0
    for seed in range(100):
        values = column(*(float(draw.random() < 0.7) for _ in range(200)))
        low, high = intervals(STRICT, items(200), values, seed=seed)["overall"]
        covered += low <= 0.7 <= high
    assert 88 <= covered <= 100


def test_rows_of_a_cluster_are_resampled_together_so_that_copies_add_no_certainty():
    single = column(*[1.0] * 30, *[0.0] * 20)
    doubled = np.repeat(single, 2, axis=0)
    apart = intervals(STRICT, items(100), doubled)["overall"]
    together = intervals(STRICT, items(100, cluster=2), doubled)["overall"]
    alone = intervals(STRICT, items(50), single)["overall"]
    assert together[1] - together[0] == pytest.approx(alone[1] - alone[0], abs=0.03)
    assert apart[1] - apart[0] < 0.8 * (together[1] - together[0])


def test_each_subset_keeps_its_size_and_averages_follow_the_benchmarks_rule():
    rows = items(50, 1, 2)
    values = column(*[1.0, 0.0] * 25, 1.0, 1.0, 1.0)
    spans = intervals(STRICT, rows, values)
    assert spans["subsets"]["subset 1"] == (1.0, 1.0)
    low, high = spans["subsets"]["subset 0"]
    mean_low, mean_high = spans["averages"]["mean_of_subsets"]
    assert (mean_low, mean_high) == (pytest.approx((low + 2) / 3), pytest.approx((high + 2) / 3))


def test_rows_that_cannot_count_are_in_no_interval():
    spans = intervals(STRICT, items(3), column(1.0, float("nan"), 1.0))
    assert spans["overall"] == (1.0, 1.0)
    assert intervals(STRICT, items(1), column(float("nan")))["overall"] is None


def test_an_overall_figure_outside_of_accuracy_has_its_interval_too():
    names = [(kind, str(n)) for n in range(20) for kind in ("ref", "tied")]
    rows = [Item(f"{kind}:{n}", "Ties", [], ("a",) * 4, (0, 1), "", cluster=n) for kind, n in names]
    draw = random.Random(0)
    scores = [[draw.gauss(1, 1), draw.gauss(1, 1), draw.gauss(0, 1), draw.gauss(0, 1)] for _ in rows]
    metric = Metric(rewardbench2.credits, rewardbench2.combine)
    values = metric.rows(rows, scores)
    low, high = intervals(metric, rows, values)["overall"]
    assert low < values.mean() < high and high - low > 0.1


def test_paired_test_of_equal_models_is_not_significant_and_of_different_ones_is():
    draw = random.Random(1)
    rows = items(150, 50)
    first = column(*(float(draw.random() < 0.6) for _ in range(200)))
    same = paired(STRICT, rows, first, first)
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)
    better = first.copy()
    better[np.flatnonzero(first == 0)[:30]] = 1
    result = paired(STRICT, rows, first, better)
    assert result.difference == pytest.approx(30 / 200)
    assert result.interval[0] > 0.05 and result.p_value < 0.001
    back = paired(STRICT, rows, better, first)
    assert back.difference == pytest.approx(-30 / 200) and back.p_value < 0.001


def test_the_permutation_p_value_is_the_exact_one_of_the_sign_test():
    """Nine rows differ, seven of them for the second: two-sided sign test, 2 x (36 + 9 + 1) / 512."""
    first = column(*[1.0] * 2, *[0.0] * 7, *[1.0] * 30)
    second = column(*[0.0] * 2, *[1.0] * 7, *[1.0] * 30)
    assert paired(STRICT, items(39), first, second).p_value == pytest.approx(2 * 46 / 512, abs=0.02)


def test_p_values_of_equally_good_models_are_spread_evenly():
    draw = random.Random(5)
    small = 0
    for seed in range(60):
        first, second = (column(*(float(draw.random() < 0.6) for _ in range(80))) for _ in range(2))
        small += paired(STRICT, items(80), first, second, seed=seed).p_value < 0.1
    assert small <= 14  # 6 expected; over 14 has a probability under 0.001


def test_a_paired_test_uses_the_rows_that_count_for_both_and_the_benchmarks_own_average():
    rows = items(2, 2)
    nan = float("nan")
    result = paired(STRICT, rows, column(1, nan, 1, 0), column(1, 1, nan, 1))
    assert (result.rows, result.overall) == (2, (0.5, 1.0))
    assert paired(STRICT, rows, column(nan, nan, 1, 1), column(1, 1, nan, nan)) is None
    by_subset = Metric(STRICT.rows, lambda means, sizes: ({}, over_rows(means, sizes)[0]["mean_of_subsets"]))
    weighted = paired(by_subset, items(3, 1), column(1, 1, 1, 0), column(1, 1, 0, 1))
    assert weighted.difference == pytest.approx((2 / 3 + 1) / 2 - 0.5)


def test_calibration_by_hand():
    gaps = [0.0, 0.1, -0.2, 3.0, 4.0, 5.0]
    points, error = calibration(gaps, bins=2)
    probability = [1 / (1 + math.exp(-abs(gap))) for gap in gaps]
    low, high = sum(probability[:3]) / 3, sum(probability[3:]) / 3
    assert points == [(pytest.approx(low), pytest.approx(1 / 3), 3), (pytest.approx(high), 1.0, 3)]
    assert error == pytest.approx((abs(low - 1 / 3) + (1 - high)) / 2)


def test_a_model_whose_gaps_are_log_odds_is_calibrated():
    draw = random.Random(2)
    gaps = []
    for _ in range(20_000):
        size = draw.uniform(0, 3)
        gaps.append(size if draw.random() < 1 / (1 + math.exp(-size)) else -size)
    assert calibration(gaps)[1] < 0.02
    assert calibration([10 * gap for gap in gaps])[1] > 0.1
    assert sum(count for _, _, count in calibration(gaps[:7])[0]) == 7


def test_accuracy_by_length_puts_every_pair_in_one_group():
    pairs = [(1, 2), (3, 5), (5, 5), (124, 100), (125, 100), (200, 100), (0, 0), (0, 10)]
    table = accuracy_by_length(pairs, [1, -1, 1, 0, 1, 1, 1, -1])
    assert table == [
        ("half or less", 0.5, 2),
        ("shorter", 0.0, 1),
        ("similar", pytest.approx(2 / 3), 3),
        ("longer", 1.0, 1),
        ("double or more", 1.0, 1),
    ]
    assert accuracy_by_length([(1, 1)], [1])[0] == ("half or less", None, 0)
