"""The scoring conversations: how a grade is read, how grades become scores, and what a finished file says about the
teacher.

Pure functions, no engine and no files. Every grade is on one scale, 1 to 10, higher is better.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable
from pathlib import Path

from distiller.engine import Ask, AskError, Completion
from distiller.records import prompt_messages
from distiller.runner import Failed, ParseError, ask_until
from distiller.templates import PromptTemplate, conversation_text
from refine.conversation import render_reply

STRENGTH_PROMPT = os.path.relpath(Path(__file__).parent / "prompts/strength.txt")
STRENGTH_VARIABLES = ("prompt", "response_a", "response_b")
CALIBRATE_PROMPT = os.path.relpath(Path(__file__).parent / "prompts/calibrate.txt")
CALIBRATE_VARIABLES = ("rejected_score",)

Grades = list[tuple[float, float]]
"""(chosen's grade, rejected's grade) of one reply each; even places with chosen shown first, odd ones with rejected
shown first."""
LOWEST, HIGHEST = 1.0, 10.0
_GRADE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10|out\s+of\s+10)?\s*", re.ASCII)


# -------------------------------------------------------------------------------------------------------------- grades


def parse_score(reply: str, tag: str = "score") -> float:
    """The grade between `<tag>` and `</tag>`; where the tag stands more than once, the last one counts.

    Read: 7, 7.5, 7/10, 7 out of 10, white space around them. Refused: another denominator, words, signs, two numbers,
    NaN, and anything outside [1, 10]. The last opening tag must itself hold the grade: a reply whose last one is cut
    or broken is not read from an earlier one, which the teacher may have meant to replace.

    Raises ParseError.
    """
    _, opened, rest = reply.rpartition(f"<{tag}>")
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
    return grade


def parse_strength(reply: str) -> tuple[float, float]:
    """(grade of response A, grade of response B) of a reply to the strength prompt. Raises ParseError."""
    return parse_score(reply, "score_a"), parse_score(reply, "score_b")


def read_strength(reply: Completion) -> tuple[float, float]:
    """`parse_strength` of a completion. One that max_tokens cut is read too: what counts is whether its grades are
    whole."""
    return parse_strength(reply.text)


def read_score(reply: Completion) -> float:
    """`parse_score` of a completion, cut ones included. Raises ParseError."""
    return parse_score(reply.text)


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


def grade_in_both_orders(
    template: PromptTemplate, row: dict, better: str, worse: str, *, seed: int, max_tries: int, turn: int = 0
) -> Generator[Ask, Completion | AskError, Grades | Failed]:
    """Preference strength of a pair, for `yield from`: `[(better's grade, worse's grade)] * 2`, with `better` shown
    first, then second.

    `turn` counts repetitions of both asks in one row: every turn has seeds of its own.
    """
    grades = []
    for order, responses in enumerate([(better, worse), (worse, better)]):
        messages = strength_messages(template, row["prompt"], *responses)
        number = 2 * turn + order
        reply = yield from ask_until(
            messages, read_strength, seed=seed, row_id=row["id"], number=number, max_tries=max_tries
        )
        if isinstance(reply, Failed):
            return Failed(f"preference strength: {reply.reason}", reply.raw)
        grades.append(reply if order == 0 else reply[::-1])
    return grades


def both_orders(grades: Grades) -> tuple[float, float]:
    """(chosen_score, rejected_score): the mean over orders, so that a taste for the first or second place cancels.

    `grades` is `[(chosen, rejected), ...]`, as many with chosen shown first as with rejected shown first.
    """
    return sum(chosen for chosen, _ in grades) / len(grades), sum(rejected for _, rejected in grades) / len(grades)


# ----------------------------------------------------------------------------------------------------------- reporting


def teacher_report(rows: Iterable[dict]) -> dict[str, float | int | None]:
    """What the scored rows of a finished file say about the teacher.

    - `pairs`: rows counted.
    - `agreement`: of the pairs that are no tie, the share whose `chosen` scores above its `rejected`; None without
      such pairs.
    - `ties`: pairs with equal scores.
    - `position_bias`: mean over pairs and both responses of (grade when shown first - grade when shown second), in
      points of the scale; 0 is no bias. Averaging both orders has already removed it from the scores.
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
        # Even places: chosen was shown first. Each is (chosen's grade, rejected's grade).
        first, second = row["grades_by_order"][0::2], row["grades_by_order"][1::2]
        chosen_bias = sum(grade[0] for grade in first) - sum(grade[0] for grade in second)
        rejected_bias = sum(grade[1] for grade in second) - sum(grade[1] for grade in first)
        bias += (chosen_bias + rejected_bias) / (2 * len(first))
    decided = pairs - ties
    return {
        "pairs": pairs,
        "agreement": agreed / decided if decided else None,
        "ties": ties,
        "position_bias": bias / pairs if pairs else None,
        "mean_margin": margin / pairs if pairs else None,
    }
