"""What the numbers mean: pure functions from rewards to metrics.

"Strict": a response wins when its reward is *greater* than the other's, so a tie is a miss. Counting ties as half
would give a model that answers the same number to everything 0.5 instead of 0. Benchmarks with another rule say so.

A function of rows gives each row its values, (rows, columns); a row with a null among its scores cannot count and gets
NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from RewardTrainer.eval.base import Item, Scores

NAN = float("nan")


def all_pairs_strict(items: Sequence[Item], scores: Sequence[Scores]) -> np.ndarray:
    """1 where every right response is strictly above every wrong one, else 0; (rows, 1)."""
    return _by_row(scores, lambda item, row: [float(all(row[r] > row[w] for r, w in item.pairs()))], items, 1)


def best_of_all(items: Sequence[Item], scores: Sequence[Scores]) -> np.ndarray:
    """RewardBench 2: 1/k where the one right response shares the maximum with k responses (itself included), else 0;
    (rows, 1)."""

    def value(item: Item, row: list[float]) -> list[float]:
        top = [index for index, score in enumerate(row) if score == max(row)]
        return [1 / len(top) if item.chosen[0] in top else 0.0]

    return _by_row(scores, value, items, 1)


def first_only_if_greater(items: Sequence[Item], scores: Sequence[Scores]) -> np.ndarray:
    """JudgeBench's reward models: A is chosen when its reward is greater, otherwise B, so that a tie is B's; (rows,
    1)."""
    return _by_row(scores, lambda item, row: [float((0 if row[0] > row[1] else 1) == item.chosen[0])], items, 1)


def rated_in_both_orders(items: Sequence[Item], scores: Sequence[Scores]) -> np.ndarray:
    """LLMBar's rating evaluators: [share of right orders, both right, same winner]; (rows, 3).

    Two equal ratings, or one that could not be read (null), make the winner depend on the order: right in exactly one.
    """
    values = []
    for item, row in zip(items, scores, strict=True):
        if None in row or row[0] == row[1]:
            values.append([0.5, 0.0, 0.0])
        else:
            right = float((0 if row[0] > row[1] else 1) == item.chosen[0])
            values.append([right, right, 1.0])
    return np.array(values).reshape(-1, 3)


def style_levels_by_row(items: Sequence[Item], scores: Sequence[Scores]) -> np.ndarray:
    """RM-Bench: [mean of the three levels, easy, normal, hard] of each row of three right and three wrong responses;
    (rows, 4). See `style_levels`."""

    def value(item: Item, row: list[float]) -> list[float]:
        levels = style_levels(style_matrix([row[:3]], [row[3:]]))
        return [sum(levels.values()) / 3, levels["easy"], levels["normal"], levels["hard"]]

    return _by_row(scores, value, items, 4)


def ties_credit(
    ref: Sequence[float], ref_correct: int, tied: Sequence[float], tied_correct: int
) -> tuple[float, float, float, float, float]:
    """The five terms of RewardBench 2's Ties score for one prompt and its reference; weights in `TIES_WEIGHTS`.

    Args:
        ref, tied: rewards of the reference's and the tied prompt's responses, the correct ones first
        ref_correct, tied_correct: how many are correct

    Returns:
        accurate on tied, accurate on ref, tied margin > spread, smaller margin > spread, tanh(smaller margin / spread
        - 1), where margin = worst correct - best incorrect and spread = best - worst correct of the tied prompt. A
        spread of 0 is taken as upstream's newest code takes it: the quotient is infinite, and 0/0 makes the term 0.
    """
    ref_margin = min(ref[:ref_correct]) - max(ref[ref_correct:])
    tied_margin = min(tied[:tied_correct]) - max(tied[tied_correct:])
    spread = max(tied[:tied_correct]) - min(tied[:tied_correct])
    smaller = min(ref_margin, tied_margin)
    ratio_term = math.tanh(smaller / spread - 1) if spread > 0 else float(np.sign(smaller))
    flags = (tied_margin > 0, ref_margin > 0, tied_margin > spread, smaller > spread)
    return (*(float(flag) for flag in flags), ratio_term)


TIES_WEIGHTS = (0.30, 0.30, 0.20, 0.20, 0.01)


def _by_row(
    scores: Sequence[Scores], value: Callable[[Item, list[float]], list[float]], items: Sequence[Item], width: int
) -> np.ndarray:
    rows = [[NAN] * width if None in row else value(item, row) for item, row in zip(items, scores, strict=True)]
    return np.array(rows).reshape(-1, width)


def strict_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs with chosen > rejected.

    Args:
        chosen, rejected: rewards, both (pairs,), not empty
    """
    chosen_rewards, rejected_rewards = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    if chosen_rewards.ndim != 1 or chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.size == 0:
        raise ValueError(f"two (pairs,) lists expected, got {chosen_rewards.shape} and {rejected_rewards.shape}")
    return float(np.mean(chosen_rewards > rejected_rewards))


def style_matrix(chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]]) -> np.ndarray:
    """RM-Bench's matrix M (3, 3): M[i, j] = share of prompts whose chosen i is strictly above their rejected j.

    i and j are styles; they come in order: concise, detailed plain, detailed markdown.

    Args:
        chosen, rejected: rewards, both (prompts, 3), not empty
    """
    chosen_rewards, rejected_rewards = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.shape[1:] != (3,) or not len(chosen_rewards):
        raise ValueError(f"two (prompts, 3) tables expected, got {chosen_rewards.shape} and {rejected_rewards.shape}")
    wins = chosen_rewards[:, :, None] > rejected_rewards[:, None, :]  # (prompts, chosen style i, rejected style j)
    return wins.mean(axis=0)


def style_levels(matrix: np.ndarray) -> dict[str, float]:
    """RM-Bench's three levels of a (3, 3) matrix.

    easy: below the diagonal, where the right answer also has the richer style; normal: the diagonal, same style;
    hard: above the diagonal, where the richer style belongs to the wrong answer.
    """
    below, above = np.tril_indices(3, k=-1), np.triu_indices(3, k=1)
    return {
        "easy": float(matrix[below].mean()),
        "normal": float(matrix.diagonal().mean()),
        "hard": float(matrix[above].mean()),
    }


def gap_margin_agreement(gaps: Sequence[float], margins: Sequence[float]) -> dict[str, float | None]:
    """How far the reward gap of a pair follows its margin.

    Args:
        gaps: chosen reward - rejected reward, (pairs,)
        margins: the teacher's (or the true) margin of the same pairs, (pairs,)

    Returns:
        gap_margin_pearson; gap_margin_spearman (Pearson of the ranks, tied values sharing their mean rank); and
        gap_margin_slope, the least-squares slope of gap over margin, 1 for a calibrated model. None where the quantity
        does not exist: fewer than two pairs, or one side is constant.
    """
    gap, margin = np.asarray(gaps, dtype=float), np.asarray(margins, dtype=float)
    if gap.ndim != 1 or gap.shape != margin.shape:
        raise ValueError(f"two (pairs,) lists expected, got {gap.shape} and {margin.shape}")
    return {
        "gap_margin_pearson": _pearson(gap, margin),
        "gap_margin_spearman": _pearson(_ranks(gap), _ranks(margin)),
        "gap_margin_slope": _slope(gap, margin),
    }


def _is_constant(values: np.ndarray) -> bool:
    return values.size < 2 or bool(np.all(values == values[0]))


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if _is_constant(a) or _is_constant(b):
        return None
    a_centred, b_centred = a - a.mean(), b - b.mean()
    correlation = float(a_centred @ b_centred / math.sqrt(float(a_centred @ a_centred) * float(b_centred @ b_centred)))
    return min(1.0, max(-1.0, correlation))  # rounding alone can leave [-1, 1]


def _slope(gap: np.ndarray, margin: np.ndarray) -> float | None:
    if _is_constant(margin):
        return None
    centred = margin - margin.mean()
    return float(centred @ (gap - gap.mean()) / (centred @ centred))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, (n,) -> (n,); equal values share the mean of the ranks they cover."""
    _, group, group_size = np.unique(values, return_inverse=True, return_counts=True)
    first_rank = np.cumsum(group_size) - group_size  # (groups,)
    return (first_rank + (group_size - 1) / 2)[group]
