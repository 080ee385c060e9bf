"""The scoring conversations: how a grade is read, how grades become scores, what graded rows say about the teacher.

Pure functions, no engine and no files. Every grade is on one scale, 1 to 10, higher is better.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from distiller.engine import Choices, Completion
from distiller.records import prompt_messages
from distiller.runner import ParseError
from distiller.templates import PromptTemplate, conversation_text
from refine.conversation import render_reply

STRENGTH_PROMPT = os.path.relpath(Path(__file__).parent / "prompts/strength.txt")
STRENGTH_VARIABLES = ("prompt", "response_a", "response_b")
STRENGTH_TAGS = ("score_a", "score_b")
CALIBRATE_PROMPT = os.path.relpath(Path(__file__).parent / "prompts/calibrate.txt")
CALIBRATE_VARIABLES = ("rejected_score",)
CALIBRATE_TAGS = ("score",)

Grades = list[tuple[float, float]]
"""(chosen's grade, rejected's grade) of one reply each; even places with chosen shown first, odd ones with rejected
shown first."""
TIE = "tie"
"""Why a row is filtered whose two responses score alike."""
LOWEST, HIGHEST = 1.0, 10.0
SCORE_TEXTS = tuple(str(score) for score in range(1, 11))
"""What `--score_mode expected` weighs."""
_GRADE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10|out\s+of\s+10)?\s*", re.ASCII)


# -------------------------------------------------------------------------------------------------------------- grades


def parse_score(reply: str, tag: str = "score") -> float:
    """The grade between `<tag>` and `</tag>`; where the tag stands more than once, the last one counts.

    Read: 7, 7.5, 7/10, 7 out of 10, white space around them. Refused: another denominator, words, signs, two numbers,
    NaN, and anything outside [1, 10]. The last opening tag must itself hold the grade: a reply whose last one is cut
    or broken is not read from an earlier one, which the teacher may have meant to replace.

    Raises ParseError.
    """
    start, end = grade_place(reply, tag)
    return float(reply[start:end])


def grade_place(reply: str, tag: str) -> tuple[int, int]:
    """Where the number lies that `parse_score` reads: (start, end). Raises ParseError."""
    before, opened, rest = reply.rpartition(f"<{tag}>")
    if not opened:
        raise ParseError(f"no <{tag}> in the reply")
    inside, closed, _ = rest.partition(f"</{tag}>")
    if not closed:
        raise ParseError(f"the last <{tag}> is not closed")
    match = _GRADE.fullmatch(inside)
    if match is None:
        raise ParseError(f"not a grade in <{tag}>: {inside.strip()[:40]!r}")
    grade = float(match[1])
    if not LOWEST <= grade <= HIGHEST:
        raise ParseError(f"grade {match[1]} in <{tag}> is outside [1, 10]")
    start = len(before) + len(opened) + match.start(1)
    return start, start + len(match[1])


def parse_grades(reply: str, tags: Sequence[str]) -> tuple[float, ...]:
    """`parse_score` for each of the tags. Raises ParseError."""
    return tuple(parse_score(reply, tag) for tag in tags)


def grade_choices(reply: Completion, tag: str) -> Choices:
    """The ten scores in the place of the grade that `parse_score` reads; around it stays what the teacher wrote.
    Raises ParseError."""
    start, end = grade_place(reply.text, tag)
    return Choices(reply.prefix + reply.text[:start], SCORE_TEXTS, reply.text[end:])


def expected_score(logprobs: Sequence[float]) -> tuple[float, float]:
    """(mean, mass): the mean of the scores 1 to 10 weighted by their probabilities, and what these sum to.

    `logprobs`: shape (10,), natural logarithms. mean = sum_s s p(s) / sum_s p(s), NaN where all of these are 0.
    """
    greatest = max(logprobs)
    if greatest == -math.inf:
        return math.nan, 0.0
    weights = [math.exp(value - greatest) for value in logprobs]
    total = math.fsum(weights)
    mean = math.fsum(float(text) * weight for text, weight in zip(SCORE_TEXTS, weights, strict=True)) / total
    return mean, math.exp(greatest) * total


def score_text(score: float) -> str:
    """A score as the teacher is told it: at most two decimals and no idle zeros (7, 6.5, 6.33)."""
    return f"{score:.2f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------------------------------- conversations


def calibration_messages(refine_prompt: str, diagnosis: str, refined: str, calibrate_prompt: str) -> list[dict]:
    """The refinement conversation going on: its prompt, the teacher's reply rebuilt from the record, the question for
    a grade."""
    return [
        {"role": "user", "content": refine_prompt},
        {"role": "assistant", "content": render_reply(diagnosis, refined)},
        {"role": "user", "content": calibrate_prompt},
    ]


def strength_messages(template: PromptTemplate, prompt: str | list[dict], first: str, second: str) -> list[dict]:
    """The conversation that asks for the strength of a pair, `first` shown as response A. Raises PromptError."""
    text = template.render(prompt=conversation_text(prompt_messages(prompt)), response_a=first, response_b=second)
    return [{"role": "user", "content": text}]


def both_orders(grades: Grades) -> tuple[float, float]:
    """(chosen_score, rejected_score): the mean over orders, so that a taste for the first or second place cancels.

    `grades` is `[(chosen, rejected), ...]`, as many with chosen shown first as with rejected shown first.
    """
    return sum(chosen for chosen, _ in grades) / len(grades), sum(rejected for _, rejected in grades) / len(grades)


def with_scores(row: dict, grades: Grades) -> dict:
    """The row with its scores and the grades behind them."""
    chosen_score, rejected_score = both_orders(grades)
    return {**row, "chosen_score": chosen_score, "rejected_score": rejected_score, "grades_by_order": grades}


def exchanged(row: dict) -> dict:
    """A scored row with chosen and rejected in each other's place, in all its fields."""
    row = dict(row)
    for ending in ("", "_score", "_model"):
        chosen, rejected = f"chosen{ending}", f"rejected{ending}"
        if chosen in row and rejected in row:
            row[chosen], row[rejected] = row[rejected], row[chosen]
    # Reversed: where one was shown first, it is now the other one.
    return row | {"grades_by_order": [(second, first) for first, second in reversed(row["grades_by_order"])]}


# ----------------------------------------------------------------------------------------------------------- reporting


def usable_grades(value: object) -> bool:
    """Whether a record's `grades_by_order` is what `Grades` says: as many pairs of grades with chosen first as with
    rejected first (a JSON file may hold anything)."""
    if not isinstance(value, (list, tuple)) or not value or len(value) % 2:
        return False
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return False
    grades = [grade for pair in value for grade in pair]
    return all(type(grade) in (int, float) and LOWEST <= grade <= HIGHEST for grade in grades)


def position_bias(grades: Grades) -> float:
    """Mean over both responses of (grade when shown first - grade when shown second), in points of the scale.

    0 is no bias; averaging both orders has already removed it from the scores.
    """
    # Even places: chosen was shown first. Each is (chosen's grade, rejected's grade).
    first, second = grades[0::2], grades[1::2]
    chosen_bias = sum(grade[0] for grade in first) - sum(grade[0] for grade in second)
    rejected_bias = sum(grade[1] for grade in second) - sum(grade[1] for grade in first)
    return (chosen_bias + rejected_bias) / (2 * len(first))


def bias_line(biases: Sequence[float]) -> str:
    """Said at the end of a command: the mean of the pairs' position biases."""
    mean = round(sum(biases) / len(biases), 2) + 0.0  # no -0.00
    return f"position bias: {mean:+.2f} points for being shown first (averaged out)"


def teacher_report(rows: Iterable[dict]) -> dict[str, float | int | None]:
    """What scored rows say about the teacher.

    - `pairs`: rows counted.
    - `agreement`: of the pairs that are no tie, the share whose `chosen` scores above its `rejected`; None without
      such pairs.
    - `ties`: pairs with equal scores.
    - `position_bias`: mean over the pairs of `position_bias`.
    - `mean_margin`: mean of chosen_score - rejected_score.
    """
    pairs = agreed = ties = 0
    bias = margin = 0.0
    for row in rows:
        pairs += 1
        gap = row["chosen_score"] - row["rejected_score"]
        margin += gap
        agreed += gap > 0
        ties += gap == 0
        bias += position_bias(row["grades_by_order"])
    decided = pairs - ties
    return {
        "pairs": pairs,
        "agreement": agreed / decided if decided else None,
        "ties": ties,
        "position_bias": bias / pairs if pairs else None,
        "mean_margin": margin / pairs if pairs else None,
    }
