"""Beside stage 1: the teacher's scores of original pairs, or initial pairs made from several models' answers.

Reads preference pairs (`prompt`, `chosen`, `rejected`) and writes them with

    chosen_score, rejected_score   the teacher's scores, from 1 to 10. It grades both responses in one reply, once with
                                   each shown first; the average cancels a taste for the first or the second place
    grades_by_order                what was averaged: [chosen, rejected] with chosen first, then with rejected first

and says at the end how often the teacher agrees with the label and how much it favours the first place. Pairs with
equal scores are kept, dropped, or regraded (asked again with other seeds, all grades averaged, up to max_tries times;
dropped if still equal): --ties.

With --responses it makes the pairs first, from files of generate_response_vllm.py joined by id: two different answers
a prompt are drawn at random, and the teacher's scores decide which is chosen (`chosen_model`, `rejected_model` say
whose they are). There a tie is always dropped.

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
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.engine import Ask, AskError, Completion
from distiller.records import parse_columns, read_rows, response_text
from distiller.runner import Done, Failed, Filtered, RowWork, Work
from distiller.templates import PromptTemplate, load_prompt
from score.candidates import draw_two, join_candidates
from score.conversation import (
    STRENGTH_PROMPT,
    STRENGTH_VARIABLES,
    Grades,
    both_orders,
    grade_in_both_orders,
    strength_messages,
    teacher_report,
)

TIE = "tie"


@dataclass
class ScoreOrigArguments(StageArguments):
    """Arguments of the scoring of original pairs."""

    prompt_file: str | None = flag(
        STRENGTH_PROMPT, "Jinja2 file with the strength prompt; knows prompt, response_a, response_b"
    )
    ties: Literal["keep", "drop", "regrade"] = flag(
        "keep", "pairs with equal scores: keep, drop, or regrade, then drop"
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


def grade_pair(
    args: ScoreOrigArguments, template: PromptTemplate, row: dict, first: str, second: str
) -> Generator[Ask, Completion | AskError, Grades | Failed]:
    """Grades in both orders; of a tie, with --ties regrade, in as many more turns as it takes, up to max_tries."""
    grades: Grades = []
    for turn in range(args.max_tries if args.ties == "regrade" else 1):
        more = yield from grade_in_both_orders(
            template, row, first, second, seed=args.seed, max_tries=args.max_tries, turn=turn
        )
        if isinstance(more, Failed):
            return more
        grades += more
        if len(set(both_orders(grades))) == 2:
            break
    return grades


def make_work(args: ScoreOrigArguments) -> Work:
    """The stage's work on one row. Raises PromptError."""
    template = load_prompt(args.prompt_file, STRENGTH_VARIABLES)

    def score_pair(row: dict) -> RowWork:
        chosen, rejected = response_text(row["chosen"]), response_text(row["rejected"])
        if chosen.strip() == rejected.strip():
            return Filtered(row, "chosen equals rejected")
        grades = yield from grade_pair(args, template, row, chosen, rejected)
        return grades if isinstance(grades, Failed) else _outcome(row, grades, args.ties != "keep")

    def make_pair(row: dict) -> RowWork:
        answers = draw_two(row["candidates"], args.seed, row["id"])
        if len(answers) < 2:
            return Filtered(row, "fewer than two different answers")
        grades = yield from grade_pair(args, template, row, *(answer["response"] for answer in answers))
        if isinstance(grades, Failed):
            return grades
        scores = both_orders(grades)
        if scores[1] > scores[0]:
            answers.reverse()
            grades = [(second, first) for first, second in reversed(grades)]  # reversed: the other one was shown first
        row = {name: value for name, value in row.items() if name != "candidates"}
        for role, answer in zip(("chosen", "rejected"), answers, strict=True):
            row |= {role: answer["response"], f"{role}_model": answer["model"]}
        return _outcome(row, grades, True)

    return make_pair if args.responses else score_pair


def _outcome(row: dict, grades: Grades, drop_ties: bool) -> Done | Filtered:
    chosen_score, rejected_score = both_orders(grades)
    row = {**row, "chosen_score": chosen_score, "rejected_score": rejected_score, "grades_by_order": grades}
    return Filtered(row, TIE) if drop_ties and chosen_score == rejected_score else Done(row)


def preview(args: ScoreOrigArguments, row: dict) -> list[list[dict]]:
    """Both conversations of a row, for --dry_run."""
    template = load_prompt(args.prompt_file, STRENGTH_VARIABLES)
    if args.responses:
        pair = [answer["response"] for answer in draw_two(row["candidates"], args.seed, row["id"])]
        if len(pair) < 2:
            return []
    else:
        pair = [response_text(row["chosen"]), response_text(row["rejected"])]
    return [strength_messages(template, row["prompt"], *order) for order in (pair, pair[::-1])]


def print_report(args: ScoreOrigArguments) -> None:
    """What all scored rows in the files say about the teacher, those of earlier runs of the same command and dropped
    ties included."""
    filtered = Path(f"{args.output}.filtered.jsonl")
    done = read_rows(args.output) if Path(args.output).stat().st_size else []
    dropped = read_rows(filtered) if filtered.stat().st_size else []
    report = teacher_report(chain(done, (row for row in dropped if row["reason"] == TIE)))
    if not report["pairs"]:
        return
    if not args.responses and report["agreement"] is not None:
        print(
            f"teacher agrees with the label: {report['agreement']:.1%} of the pairs that are no tie", file=sys.stderr
        )
    print(f"ties: {report['ties']} of {report['pairs']} scored pairs", file=sys.stderr)
    print(
        f"position bias: {report['position_bias']:+.2f} points for being shown first (averaged out)", file=sys.stderr
    )
    print(f"mean margin: {report['mean_margin']:+.2f} points", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(ScoreOrigArguments, Path(__file__).parent / "configs/orig_example.yaml", __doc__, argv)
    code = run(
        args,
        make_work,
        stage="score_orig",
        required={"prompt": "", "chosen": "", "rejected": ""},
        rows=(lambda: join_candidates(args.responses, parse_columns(args.columns), args.limit))
        if args.responses
        else None,
        preview=partial(preview, args),
    )
    if code == 0 and not args.dry_run:
        print_report(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
