"""Metrics over a judge's verdicts: pure functions from verdicts to the values of a row.

A verdict names the preferred one of the responses shown, in the order shown. What a tie, an unreadable reply (None) or
a missing verdict counts is each benchmark's own rule:

    default       a pair is worth the mean over the orders it was shown in, 1 right, 0.5 tie or unreadable, 0 wrong
    both orders   JudgeBench: +1, -1 and 0 over both orders, right when the sum is positive;
                  LLMBar, EvalBiasBench: share of right orders, both right, same winner in both

A row with a verdict missing (no line at all, as against an unreadable one) cannot count: its values are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from RewardTrainer.eval.base import TIE, Item, Verdict

NAN = float("nan")


def pair_credits(item: Item, verdicts: Sequence[Verdict]) -> dict[tuple[int, int], float]:
    """(right, wrong) pair -> mean over its verdicts of 1, 0.5 (tie, unreadable) or 0; NaN for a pair without one."""
    credits: dict[tuple[int, int], list[float]] = {pair: [] for pair in item.pairs()}
    for verdict in verdicts:
        for right, wrong in credits:
            if set(verdict.order) == {right, wrong}:
                undecided = verdict.winner in (None, TIE)
                credits[right, wrong].append(0.5 if undecided else float(verdict.winner == right))
    return {pair: sum(values) / len(values) if values else NAN for pair, values in credits.items()}


def mean_pair_credit(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """Mean credit over a row's pairs, (rows, 1)."""
    rows = [list(pair_credits(item, said).values()) for item, said in zip(items, verdicts, strict=True)]
    return np.array([[sum(row) / len(row)] for row in rows]).reshape(-1, 1)


def all_pairs_won(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """1 where the right response won every pair on balance (credit over 0.5), else 0, (rows, 1)."""
    rows = [list(pair_credits(item, said).values()) for item, said in zip(items, verdicts, strict=True)]
    won = [NAN if np.isnan(row).any() else float(all(credit > 0.5 for credit in row)) for row in rows]
    return np.array(won).reshape(-1, 1)


def choice_of_all(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """One choice among all k responses at once: 1 for the right one, 1/k for a tie or an unreadable reply, else 0;
    (rows, 1), the mean where a row was asked more than once."""
    values = []
    for item, said in zip(items, verdicts, strict=True):
        whole = [verdict for verdict in said if sorted(verdict.order) == list(range(len(item.responses)))]
        worth = [
            1 / len(item.responses) if verdict.winner in (None, TIE) else float(verdict.winner in item.chosen)
            for verdict in whole
        ]
        values.append([sum(worth) / len(worth) if worth else NAN])
    return np.array(values).reshape(-1, 1)


def both_orders(
    rule: Callable[[int, int | str | None, int | str | None], Sequence[float]], width: int
) -> Callable[[Sequence[Item], Sequence[Sequence[Verdict]]], np.ndarray]:
    """A metric over rows of two responses that needs both orders.

    Args:
        rule: (index of the right response, winner with the order of the row, winner with the order swapped) -> the
            values of the row
        width: how many those are
    """

    def rows(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
        values = []
        for item, said in zip(items, verdicts, strict=True):
            by_order = {verdict.order: verdict.winner for verdict in said}
            complete = (0, 1) in by_order and (1, 0) in by_order
            values.append(rule(item.chosen[0], by_order[0, 1], by_order[1, 0]) if complete else [NAN] * width)
        return np.array(values, dtype=float).reshape(-1, width)

    return rows


def judgebench_rule(right: int, first: int | str | None, second: int | str | None) -> list[float]:
    """[right or not]: +1 for each verdict for the right response, -1 for each against it, 0 for a tie or an unreadable
    one; right when the sum is positive (JudgeBench's `compute_final_metrics`, after its second decision is flipped
    back)."""
    worth = sum(0 if winner in (None, TIE) else 1 if winner == right else -1 for winner in (first, second))
    return [float(worth > 0)]


def llmbar_rule(right: int, first: int | str | None, second: int | str | None) -> list[float]:
    """[share of right orders, both right, same winner]; two unreadable replies are the same winner, as upstream
    compares them."""
    return [((first == right) + (second == right)) / 2, float(first == second == right), float(first == second)]


def evalbiasbench_rule(right: int, first: int | str | None, second: int | str | None) -> list[float]:
    """[share of right orders, both right, same winner or two ties]; two unreadable replies do not agree."""
    share, both, _ = llmbar_rule(right, first, second)
    return [share, both, float(first == second and first is not None)]
