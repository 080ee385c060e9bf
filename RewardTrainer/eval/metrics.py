"""What the numbers mean: pure functions from rewards to metrics.

"Strict" everywhere: a response wins when its reward is *greater* than the other's, so a tie is a miss. Counting ties
as half would give a model that answers the same number to everything 0.5 instead of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


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
