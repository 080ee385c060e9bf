"""Beside stage 1: the teacher's scores of original pairs, or initial pairs made from several models' answers.

Reads preference pairs (`prompt`, `chosen`, `rejected`) and writes them with

    chosen_score, rejected_score   the teacher's scores, from 1 to 10. It grades both responses in one reply, once with
                                   each shown first; the average cancels a taste for the first or the second place
    grades_by_order                what was averaged: [chosen, rejected] with chosen first, then with rejected first

and says at the end how often the teacher agrees with the label and how much it favours the first place. --score_mode
says what a grade is: what one reply says (sample), what each of n replies says (mean), or the mean of 1 to 10 weighted
by the probability that the reply gives each of them (expected; in process or with a vLLM server).

With --responses it makes the pairs first, from files of generate_response_vllm.py joined by id: two different answers
a prompt are drawn at random, and the teacher's scores decide which is chosen (`chosen_by` is "teacher", and
`chosen_model`, `rejected_model` say whose they are).

Pairs with equal scores (--ties) are kept where they have a label and dropped where the scores were to decide, unless
you say otherwise: keep, drop, or regrade (asked again with other seeds, all grades averaged, up to max_tries times;
dropped if still equal). score/regrade_ties.py regrades the kept ones of a finished file.

A dropped row goes to <output>.filtered.jsonl, one without usable grades to <output>.failed.jsonl. The same command
goes on after an interruption.

    # the pairs of the embedded world, on any CPU
    python score/score_orig_vllm.py

    # initial pairs with the paper's teacher on one GPU
    python score/score_orig_vllm.py --config score/configs/orig_paper.yaml --output data/pairs.jsonl \\
        --responses data/responses/qwen2.5-7b.jsonl data/responses/llama-3.1-8b.jsonl

    # a server instead (key from OPENAI_API_KEY)
    python score/score_orig_vllm.py --config score/configs/orig_paper.yaml --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from distiller.cli import flag, parse_stage_args, run
from distiller.records import parse_columns, response_text
from distiller.runner import Done, Failed, Filtered, RowWork, Work
from distiller.templates import PromptTemplate, load_prompt
from score.candidates import draw_two, join_candidates
from score.conversation import (
    STRENGTH_PROMPT,
    STRENGTH_TAGS,
    STRENGTH_VARIABLES,
    TIE,
    Grades,
    bias_line,
    both_orders,
    exchanged,
    strength_messages,
    teacher_report,
    with_scores,
)
from score.grading import Asking, ScoreArguments, grade_in_both_orders, previewed, scored_rows


@dataclass
class ScoreOrigArguments(ScoreArguments):
    """Arguments of the scoring of original pairs."""

    prompt_file: str | None = flag(
        STRENGTH_PROMPT, "Jinja2 file with the strength prompt; knows prompt, response_a, response_b"
    )
    ties: Literal["keep", "drop", "regrade"] | None = flag(
        None,
        "pairs with equal scores: keep, drop, or regrade, then drop; keep for labelled pairs unless given, else drop",
    )
    responses: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files of generate_response_vllm.py to make initial pairs from; they take the place of --input"
        },
    )

    INPUT_FIELDS = ("input", "responses")

    def validate(self) -> None:
        if self.responses:
            self.input = self.responses[0]
        super().validate()

    @property
    def drops_ties(self) -> bool:
        return (self.ties or ("drop" if self.responses else "keep")) != "keep"


def grade_pair(args: ScoreOrigArguments, template: PromptTemplate, row: dict, first: str, second: str) -> Asking:
    """Grades in both orders; of a tie, with --ties regrade, in as many more turns as it takes, up to max_tries."""
    grades: Grades = []
    for _ in range(args.max_tries if args.ties == "regrade" else 1):
        more = yield from grade_in_both_orders(args, template, row, first, second, number=len(grades))
        if isinstance(more, Failed):
            return more
        grades += more
        if len(set(both_orders(grades))) == 2:
            break
    return grades


def make_work(args: ScoreOrigArguments) -> Work:
    """The stage's work on one row. Raises PromptError."""
    template = load_prompt(args.prompt_file, STRENGTH_VARIABLES)

    def outcome(row: dict) -> Done | Filtered:
        return Filtered(row, TIE) if args.drops_ties and row["chosen_score"] == row["rejected_score"] else Done(row)

    def score_pair(row: dict) -> RowWork:
        chosen, rejected = response_text(row["chosen"]), response_text(row["rejected"])
        if chosen.strip() == rejected.strip():
            return Filtered(row, "chosen equals rejected")
        grades = yield from grade_pair(args, template, row, chosen, rejected)
        return grades if isinstance(grades, Failed) else outcome(with_scores(row, grades))

    def make_pair(row: dict) -> RowWork:
        answers = draw_two(row["candidates"], args.seed, row["id"])
        if len(answers) < 2:
            return Filtered(row, "fewer than two different answers")
        grades = yield from grade_pair(args, template, row, *(answer["response"] for answer in answers))
        if isinstance(grades, Failed):
            return grades
        row = {name: value for name, value in row.items() if name != "candidates"} | {"chosen_by": "teacher"}
        for role, answer in zip(("chosen", "rejected"), answers, strict=True):
            row |= {role: answer["response"], f"{role}_model": answer["model"]}
        row = with_scores(row, grades)
        return outcome(row if row["chosen_score"] >= row["rejected_score"] else exchanged(row))

    return make_pair if args.responses else score_pair


def preview(args: ScoreOrigArguments, row: dict) -> list[list[dict]]:
    """Both conversations of a row, for --dry_run."""
    template = load_prompt(args.prompt_file, STRENGTH_VARIABLES)
    if args.responses:
        pair = [answer["response"] for answer in draw_two(row["candidates"], args.seed, row["id"])]
        if len(pair) < 2:
            return []
    else:
        pair = [response_text(row["chosen"]), response_text(row["rejected"])]
    asked = [strength_messages(template, row["prompt"], *order) for order in (pair, pair[::-1])] * args.samples
    return previewed(args, asked, STRENGTH_TAGS)


def report(args: ScoreOrigArguments, rows: Iterable[dict]) -> str:
    """What scored rows, dropped ties included, say about the teacher; "" where there are none."""
    said = teacher_report(rows)
    if not said["pairs"]:
        return ""
    lines = []
    if not args.responses and said["agreement"] is not None:
        lines.append(f"teacher agrees with the label: {said['agreement']:.1%} of the pairs that are no tie")
    return "\n".join(
        [
            *lines,
            f"ties: {said['ties']} of {said['pairs']} scored pairs",
            bias_line([said["position_bias"]]),
            f"mean margin: {said['mean_margin']:+.2f} points",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(ScoreOrigArguments, Path(__file__).parent / "configs/orig_example.yaml", __doc__, argv)
    return run(
        args,
        make_work,
        stage="score_orig",
        required={"prompt": "", "chosen": "", "rejected": ""},
        rows=(lambda: join_candidates(args.responses, parse_columns(args.columns), args.limit))
        if args.responses
        else None,
        preview=partial(preview, args),
        report=lambda: report(args, scored_rows(args.output, TIE)),
    )


if __name__ == "__main__":
    sys.exit(main())
