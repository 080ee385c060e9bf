"""What verdicts say about the judge that gave them: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from RewardTrainer.eval.base import TIE, Item, Verdict


@dataclass(frozen=True)
class Judged:
    """A verdict with what the judge said."""

    verdict: Verdict
    raw: str
    scores: tuple[float, ...] | None = None
    """Of the responses in the order shown; None where the form asks for none or the reply could not be read."""


Value = float | int | None


def judge_statistics(items: Sequence[Item], judged: Sequence[Sequence[Judged]]) -> dict[str, Value]:
    """The judge on one benchmark. A share of nothing is None.

    Args:
        items: rows
        judged: what was said about each, (rows,) lists

    Returns:
        - `verdicts`, `unreadable`, `ties`: counted
        - `unreadable_rate`: unreadable / verdicts
        - `label_agreement`: of the verdicts that name a response, the share that name a right one
        - `first_place`: of the same, the share that name the response shown first; half of them (of four responses a
          quarter) where the place does not count and the orders are drawn, or both were asked
        - `pairs`: pairs with a readable verdict in both orders; the four below are over them
        - `consistency`: share with the same outcome in both orders (twice the same response, or twice a tie)
        - `both_right`: share with the right response in both orders
        - `position_bias`: mean over their verdicts of +1 where the response shown first won, -1 where the second did,
          0 for a tie. The same response wins once from each place, so that a judge who looks at the content alone has
          0, one who always names the first place 1
        - `position_bias_points`: likewise for scores, mean over both responses of (score when first - score when
          second); None unless the form asks for scores
    """
    said = [(item, each) for item, row in zip(items, judged, strict=True) for each in row]
    winners = [each.verdict.winner for _, each in said]
    named = [
        (i, each.verdict.order, winner)
        for (i, each), winner in zip(said, winners, strict=True)
        if winner not in (None, TIE)
    ]
    both = [pair for item, row in zip(items, judged, strict=True) for pair in _in_both_orders(item, row)]
    outcomes = [(first.verdict.winner, second.verdict.winner) for _, first, second in both]
    places = [_place(each) for _, *pair in both for each in pair]
    points = [_points(first, second) for _, first, second in both if first.scores and second.scores]
    unreadable = sum(winner is None for winner in winners)
    return {
        "verdicts": len(said),
        "unreadable": unreadable,
        "ties": sum(winner == TIE for winner in winners),
        "unreadable_rate": unreadable / len(said) if said else None,
        "label_agreement": _mean([winner in item.chosen for item, _, winner in named]),
        "first_place": _mean([winner == order[0] for _, order, winner in named]),
        "pairs": len(both),
        "consistency": _mean([first == second for first, second in outcomes]),
        "both_right": _mean(
            [
                first == second and first in item.chosen
                for (item, *_), (first, second) in zip(both, outcomes, strict=True)
            ]
        ),
        "position_bias": _mean(places),
        "position_bias_points": _mean(points),
    }


def rating_statistics(items: Sequence[Item], scores: Sequence[Sequence[float | None]]) -> dict[str, Value]:
    """A judge that rates one response at a time.

    Args:
        items: rows
        scores: ratings of each row's responses, None where one could not be read

    Returns:
        `ratings`, `unreadable`, `unreadable_rate`; `pairs` of a right and a wrong response with both ratings, `ties`
        among them, and `label_agreement`, the share of the other pairs with the right response above. There is no
        order, hence no bias towards one.
    """
    ratings = [score for row in scores for score in row]
    gaps = [
        row[right] - row[wrong]
        for item, row in zip(items, scores, strict=True)
        for right, wrong in item.pairs()
        if row[right] is not None and row[wrong] is not None
    ]
    unreadable = sum(score is None for score in ratings)
    return {
        "ratings": len(ratings),
        "unreadable": unreadable,
        "unreadable_rate": unreadable / len(ratings) if ratings else None,
        "pairs": len(gaps),
        "ties": sum(gap == 0 for gap in gaps),
        "label_agreement": _mean([gap > 0 for gap in gaps if gap]),
    }


def verdicts_of_ratings(item: Item, row: Sequence[float | None]) -> list[Verdict]:
    """The verdicts, in both orders, of a judge that prefers the higher rating: a tie where two are equal, None where
    one could not be read."""
    verdicts = []
    for right, wrong in item.pairs():
        low, high = sorted((right, wrong))
        if row[low] is None or row[high] is None:
            winner = None
        else:
            winner = TIE if row[low] == row[high] else low if row[low] > row[high] else high
        verdicts += [Verdict((low, high), winner), Verdict((high, low), winner)]
    return verdicts


def _in_both_orders(item: Item, row: Sequence[Judged]) -> list[tuple[Item, Judged, Judged]]:
    """(item, as in the row, swapped) of its pairs that have a readable verdict in both orders."""
    readable = {each.verdict.order: each for each in row if each.verdict.winner is not None}
    return [
        (item, each, readable[order[::-1]])
        for order, each in readable.items()
        if len(order) == 2 and order[0] < order[1] and order[::-1] in readable
    ]


def _place(each: Judged) -> int:
    winner, order = each.verdict.winner, each.verdict.order
    return 0 if winner == TIE else 1 if winner == order[0] else -1


def _points(first: Judged, second: Judged) -> float:
    """Each response stands first in one of the two."""
    return (first.scores[0] - second.scores[1] + second.scores[0] - first.scores[1]) / 2


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
