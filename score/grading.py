"""Asking the teacher for grades: in one of three ways (`--score_mode`), of a pair in both orders or of one text.

A reply that max_tokens cut is read like any other: what counts is whether its grades are whole. Only grades of the
answer count; a reply that may have been cut inside its thinking has none.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distiller.arguments import StageArguments, flag
from distiller.dry_run import Weighing
from distiller.engine import Ask, AskError, Completion, EngineDead
from distiller.records import InputError, read_rows
from distiller.runner import Failed, ParseError, ask_until, text_of
from distiller.templates import PromptTemplate
from score.conversation import (
    SCORE_TEXTS,
    STRENGTH_TAGS,
    Grades,
    expected_score,
    grade_choices,
    parse_grades,
    strength_messages,
)

LEAST_MASS = 0.1
"""Probability that the ten scores must have together for their mean to be worth something. It falls short where the
teacher would rather write 7.5, or something that is no grade at all."""

Asking = Generator[Ask, Completion | AskError, Grades | Failed]


@dataclass
class ScoreArguments(StageArguments):
    """What the scoring commands share."""

    score_mode: Literal["sample", "mean", "expected"] = flag(
        "sample",
        "sample: what one reply says; mean: over num_score_samples replies; expected: over the scores 1 to 10, each "
        "weighted by the probability that the teacher's reply gives it",
    )
    num_score_samples: int = flag(8, "replies a grade with --score_mode mean")

    def validate(self) -> None:
        super().validate()
        if self.num_score_samples < 1:
            raise InputError(f"--num_score_samples {self.num_score_samples} is out of range (from 1)")

    @property
    def samples(self) -> int:
        """Replies behind one grade."""
        return self.num_score_samples if self.score_mode == "mean" else 1


def ask_grades(
    args: ScoreArguments, messages: list[dict], tags: Sequence[str], row_id: str, number: int
) -> Generator[Ask, Completion | AskError, tuple[float, ...] | Failed]:
    """The grade in each of the tags, from one reply; `number` as in `ask_until`.

    With --score_mode expected the reply only leads up to the grades: each is put in doubt where it stands, and the ten
    scores are weighed in its place. A grade that follows another one is weighed after that one as the reply has it.
    """
    return (
        yield from ask_until(
            messages,
            lambda reply: parse_grades(text_of(reply), tags),
            seed=args.seed,
            row_id=row_id,
            number=number,
            max_tries=args.max_tries,
            follow_up=(lambda reply: _weigh(messages, reply, tags)) if args.score_mode == "expected" else None,
        )
    )


def _weigh(
    messages: list[dict], reply: Completion, tags: Sequence[str]
) -> Generator[Ask, Completion | AskError, tuple[float, ...] | Failed]:
    if reply.prefix is None:
        raise EngineDead(
            "the server takes the thinking out of the reply, so that the reply cannot be gone on from: start it "
            "without a reasoning parser (we split the thinking off ourselves), or take --score_mode mean"
        )
    grades = []
    for tag in tags:
        answer = yield Ask(messages, 0, choices=grade_choices(reply, tag))
        if isinstance(answer, AskError):
            return Failed(str(answer), reply.text)
        mean, mass = expected_score(answer.choice_logprobs)
        if mass < LEAST_MASS:
            raise ParseError(f"the scores 1 to 10 hold only {mass:.2g} of the probability in <{tag}>")
        grades.append(mean)
    return tuple(grades)


def grade_in_both_orders(
    args: ScoreArguments,
    template: PromptTemplate,
    row: dict,
    better: str,
    worse: str,
    *,
    number: int = 0,
    turns: int | None = None,
) -> Asking:
    """Preference strength of a pair, for `yield from`: `[(better's grade, worse's grade), ...]` with `better` shown
    first, then second, once more for each further turn.

    turns: as many as the score mode wants replies, unless given. number: of the first ask; every ask has seeds of its
    own.
    """
    grades: Grades = []
    for turn in range(args.samples if turns is None else turns):
        for order, responses in enumerate([(better, worse), (worse, better)]):
            messages = strength_messages(template, row["prompt"], *responses)
            pair = yield from ask_grades(args, messages, STRENGTH_TAGS, row["id"], number + 2 * turn + order)
            if isinstance(pair, Failed):
                return Failed(f"preference strength: {pair.reason}", pair.raw)
            grades.append(pair if order == 0 else pair[::-1])
    return grades


def previewed(args: ScoreArguments, conversations: list[list[dict]], tags: Sequence[str]) -> list[list[dict]]:
    """Conversations that ask for the grades in the tags, for --dry_run, with what --score_mode expected asks after
    each."""
    if args.score_mode != "expected":
        return conversations
    # A tree (`distiller/choices.py`) has a node for each score and its root, whether "10" is one token or two.
    requests = len(SCORE_TEXTS) + 1
    return [asked for each in conversations for asked in (each, *(Weighing(each, requests) for _ in tags))]


def scored_rows(output: str | Path, reason: str) -> Iterator[dict]:
    """The rows of the output, those of earlier runs of the same command included, and those that were filtered for
    this reason."""
    filtered = Path(f"{output}.filtered.jsonl")
    if Path(output).is_file() and Path(output).stat().st_size:
        yield from read_rows(output)
    if filtered.is_file() and filtered.stat().st_size:
        yield from (row for row in read_rows(filtered) if row["reason"] == reason)
