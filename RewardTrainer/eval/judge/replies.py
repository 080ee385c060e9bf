"""How a judge's reply is read, for every form of prompt. Pure functions.

    pairwise_scores             <score_a>7</score_a> <score_b>4.5</score_b>: the highest wins, equal ones tie
    pairwise_verdict            <verdict>A</verdict>, or tie
    pairwise_verdict_reasoned   the same after the judge's reasons
    pointwise_score             <score>7</score> of one response

Where a tag stands more than once the last one counts, and it must itself hold the answer: a reply whose last tag is
cut or broken is not read from an earlier one, which the judge may have meant to replace. What cannot be read is never
guessed from the prose around it. A reply that is a verdict and nothing else needs no tag.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from string import ascii_uppercase

from distiller.runner import ParseError
from RewardTrainer.eval.base import TIE

POINTWISE = "pointwise_score"
LOWEST, HIGHEST = 1.0, 10.0
_SCORE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10|out\s+of\s+10)?\s*", re.ASCII)
_VERDICT = re.compile(r"\s*(?:response\s+)?([a-z]|tie)\s*", re.ASCII | re.IGNORECASE)


def in_last_tag(reply: str, tag: str) -> str:
    """The text between the last `<tag>` and its `</tag>`. Raises ParseError."""
    _, opened, rest = reply.rpartition(f"<{tag}>")
    if not opened:
        raise ParseError(f"no <{tag}> in the reply")
    inside, closed, _ = rest.partition(f"</{tag}>")
    if not closed:
        raise ParseError(f"the last <{tag}> is not closed")
    return inside


def read_score(reply: str, tag: str) -> float:
    """A score from 1 to 10: 7, 7.5, 7/10, 7 out of 10. Refused: words, signs, two numbers, another denominator, any
    other range. Raises ParseError."""
    inside = in_last_tag(reply, tag)
    match = _SCORE.fullmatch(inside)
    if match is None:
        raise ParseError(f"not a score in <{tag}>: {inside.strip()[:40]!r}")
    score = float(match[1])
    if not LOWEST <= score <= HIGHEST:
        raise ParseError(f"score {match[1][:40]} in <{tag}> is outside [1, 10]")
    return score


def pairwise_scores(reply: str, shown: int) -> dict:
    """{"verdict", "scores"}: the letter with the highest score, a tie where several have it, and the scores in the
    order shown. Raises ParseError."""
    scores = [read_score(reply, f"score_{letter.lower()}") for letter in ascii_uppercase[:shown]]
    best = [letter for letter, score in zip(ascii_uppercase, scores, strict=False) if score == max(scores)]
    return {"verdict": best[0] if len(best) == 1 else TIE, "scores": scores}


def pairwise_verdict(reply: str, shown: int) -> dict:
    """{"verdict"}: a letter of those shown, or "tie". Raises ParseError."""
    inside = reply if _VERDICT.fullmatch(reply) else in_last_tag(reply, "verdict")
    match = _VERDICT.fullmatch(inside)
    if match is None:
        raise ParseError(f"not a verdict in <verdict>: {inside.strip()[:40]!r}")
    word = match[1].lower()
    if word == TIE:
        return {"verdict": TIE}
    if word.upper() not in ascii_uppercase[:shown]:
        raise ParseError(f"verdict {word.upper()} is none of the {shown} responses shown")
    return {"verdict": word.upper()}


def pointwise_score(reply: str, shown: int) -> dict:
    """{"score"} of the one response shown. Raises ParseError."""
    return {"score": read_score(reply, "score")}


READERS: dict[str, Callable[[str, int], dict]] = {
    "pairwise_scores": pairwise_scores,
    "pairwise_verdict": pairwise_verdict,
    "pairwise_verdict_reasoned": pairwise_verdict,
    POINTWISE: pointwise_score,
}
"""Form -> (reply, how many responses were shown) -> what it says."""
