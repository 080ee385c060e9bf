"""Stage 2: the teacher scores its own edit, knowing what the response was given before; the difference is the margin.

Reads what refine_response_vllm.py wrote and writes the training set, at once a TRL preference dataset with margins:

    chosen, chosen_score               the refined response, and the teacher's own score s of it, from 1 to 10
    rejected, rejected_score           the rejected response and its score s_l
    margin                             s - s_l
    original_chosen, ..._score         what `chosen` was before refinement
    verified, verify_grades_by_order   with --verify, see below

For s the refinement conversation goes on: the teacher reads its own diagnosis and edit, is told s_l, and grades the
edit on that scale. Where a row has no rejected_score, the original pair is scored first, as score_orig_vllm.py does
it. --refine_prompt_file must be the file stage 1 used, since its prompt is a part of the conversation; where the
manifest of stage 1 lies beside the input, this is checked.

--score_mode says what a grade is: what one reply says (sample), the mean over n replies (mean), or the mean of 1 to 10
weighted by the probability that the reply gives each of them (expected; in process or with a vLLM server).

--verify asks a second opinion on every row that is kept: the teacher grades the edit and the rejected response as any
two responses, in both orders, not knowing which is which. Where it does not prefer the edit, `verified` is false; the
row stays, for you to keep or to leave out.

A margin of --min_margin or less goes to <output>.filtered.jsonl, a row without usable grades to <output>.failed.jsonl.
The same command goes on after an interruption.

    # the embedded world with its tiny teacher, on any CPU
    python score/cali_score_vllm.py

    # the paper's setting on one GPU: Qwen3-14B
    python score/cali_score_vllm.py --config score/configs/paper.yaml

    # a server instead (key from OPENAI_API_KEY)
    python score/cali_score_vllm.py --config score/configs/paper.yaml --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distiller.cli import flag, parse_stage_args, run
from distiller.engine import Ask, AskError, Completion
from distiller.manifest import hash_file, identity_before_filters
from distiller.records import InputError, response_text
from distiller.runner import Done, Failed, Filtered, RowWork, Work
from distiller.templates import PromptTemplate, load_prompt
from refine.conversation import REFINE_PROMPT, REFINE_VARIABLES, refine_messages
from score.conversation import (
    CALIBRATE_PROMPT,
    CALIBRATE_TAGS,
    CALIBRATE_VARIABLES,
    HIGHEST,
    LOWEST,
    STRENGTH_PROMPT,
    STRENGTH_TAGS,
    STRENGTH_VARIABLES,
    bias_line,
    both_orders,
    calibration_messages,
    position_bias,
    score_text,
    strength_messages,
    usable_grades,
    with_scores,
)
from score.grading import ScoreArguments, ask_grades, grade_in_both_orders, previewed, scored_rows

REFINE_COMMAND = "python refine/refine_response_vllm.py"
LOW_MARGIN = "margin not over min_margin"
SCORE_RANGES = {"rejected_score": (LOWEST, HIGHEST)}
"""Those of the numbers that a row may bring along."""


@dataclass
class CaliScoreArguments(ScoreArguments):
    """Arguments of the self-calibrated scoring."""

    prompt_file: str | None = flag(CALIBRATE_PROMPT, "Jinja2 file with the calibration prompt; knows rejected_score")
    strength_prompt_file: str = flag(
        STRENGTH_PROMPT, "prompt for the strength of original pairs without scores, and for --verify"
    )
    refine_prompt_file: str = flag(REFINE_PROMPT, "the prompt file the refinement stage used")
    min_margin: float = flag(0.0, "filter pairs with this margin or a smaller one")
    verify: bool = flag(False, "mark the rows whose edit the teacher prefers when it does not know which is which")

    RANGES = {**ScoreArguments.RANGES, "min_margin": (-math.inf, None)}  # no NaN
    PROMPT_FIELDS = ("prompt_file", "strength_prompt_file", "refine_prompt_file")

    def validate(self) -> None:
        super().validate()
        check_refinement(self)


def check_refinement(args: CaliScoreArguments) -> None:
    """Compare with the manifest beside the input, if there is one: another prompt is refused, another teacher is said
    aloud."""
    identity = identity_before_filters(args.input)
    if identity.get("stage") != "refine":
        return
    used = identity.get("prompts", {}).get("prompt_file")
    if Path(args.refine_prompt_file).is_file() and used != [hash_file(args.refine_prompt_file)]:
        raise InputError(
            f"{args.input} was refined with another prompt than {args.refine_prompt_file}, so the conversation cannot "
            "go on from it; name the file of that run with --refine_prompt_file, or refine again"
        )
    if identity.get("model") != args.model:
        print(
            f"warning: {args.input} was refined by {identity.get('model')} and is scored by {args.model}; "
            "a self-calibrated score is meant to be the same teacher's",
            file=sys.stderr,
        )


def make_work(args: CaliScoreArguments) -> Work:
    """The stage's work on one row. Raises PromptError."""
    calibrate = load_prompt(args.prompt_file, CALIBRATE_VARIABLES)
    strength = load_prompt(args.strength_prompt_file, STRENGTH_VARIABLES)
    refinement = load_prompt(args.refine_prompt_file, REFINE_VARIABLES)

    def work(row: dict) -> RowWork:
        if row.get("rejected_score") is None:
            chosen, rejected = response_text(row["chosen"]), response_text(row["rejected"])
            grades = yield from grade_in_both_orders(args, strength, row, chosen, rejected)
            if isinstance(grades, Failed):
                return grades
            row = with_scores(row, grades)

        messages = calibrated_messages(refinement, calibrate, row, row["rejected_score"])
        score = yield from calibrated_score(args, messages, row["id"])
        if isinstance(score, Failed):
            return score
        row = scored_record(row, score)
        if row["margin"] <= args.min_margin:
            return Filtered(row, LOW_MARGIN)
        if not args.verify:
            return Done(row)
        # The strength prompt: what "better" means stands in one place, a user's own edits of it included, and its
        # grades say by how much. The refined response is now `chosen`.
        pair = (response_text(row["chosen"]), response_text(row["rejected"]))
        grades = yield from grade_in_both_orders(args, strength, row, *pair, number=3 * args.samples)
        if isinstance(grades, Failed):
            return Failed(f"verification: {grades.reason}", grades.raw)
        refined_score, rejected_score = both_orders(grades)
        return Done({**row, "verified": refined_score > rejected_score, "verify_grades_by_order": grades})

    return work


def calibrated_messages(
    refinement: PromptTemplate, calibrate: PromptTemplate, row: dict, rejected_score: float
) -> list[dict]:
    """The refinement conversation of the row, and the question for a score of the edit. Raises PromptError."""
    asked = refine_messages(refinement, row, response_text(row["teacher_response"]))[0]["content"]
    question = calibrate.render(rejected_score=score_text(rejected_score))
    return calibration_messages(asked, row["diagnosis"], response_text(row["refined_response"]), question)


def calibrated_score(
    args: CaliScoreArguments, messages: list[dict], row_id: str
) -> Generator[Ask, Completion | AskError, float | Failed]:
    """The self-calibrated score; with --score_mode mean that of several replies, and one that cannot be had fails them
    all."""
    total = 0.0
    for sample in range(args.samples):
        number = 2 * args.samples + sample  # those before it are the strength's
        grades = yield from ask_grades(args, messages, CALIBRATE_TAGS, row_id, number)
        if isinstance(grades, Failed):
            return Failed(f"calibrated score: {grades.reason}", grades.raw)
        total += grades[0]
    return total / args.samples


def scored_record(row: dict, score: float) -> dict:
    """The row with the refined response in the place of `chosen`, in the form (text or messages) that `rejected`
    has."""
    refined = response_text(row["refined_response"])
    record = {name: value for name, value in row.items() if name not in ("refined_response", "chosen_score")}
    record["chosen"] = refined if isinstance(row["rejected"], str) else [{"role": "assistant", "content": refined}]
    record["original_chosen"] = row["chosen"]
    if row.get("chosen_score") is not None:
        record["original_chosen_score"] = row["chosen_score"]
    return record | {"chosen_score": score, "margin": score - row["rejected_score"]}


def preview(args: CaliScoreArguments, row: dict) -> list[list[dict]]:
    """All conversations of a row, for --dry_run; 5 stands in for a rejected_score not known yet."""
    strength = load_prompt(args.strength_prompt_file, STRENGTH_VARIABLES)

    def in_both_orders(better: str) -> list[list[dict]]:
        pair = (response_text(row[better]), response_text(row["rejected"]))
        asked = [strength_messages(strength, row["prompt"], *order) for order in (pair, pair[::-1])] * args.samples
        return previewed(args, asked, STRENGTH_TAGS)

    rejected_score = row.get("rejected_score")
    before = in_both_orders("chosen") if rejected_score is None else []
    after = in_both_orders("refined_response") if args.verify else []
    refinement = load_prompt(args.refine_prompt_file, REFINE_VARIABLES)
    calibrate = load_prompt(args.prompt_file, CALIBRATE_VARIABLES)
    calibration = calibrated_messages(refinement, calibrate, row, 5 if rejected_score is None else rejected_score)
    return before + previewed(args, [calibration] * args.samples, CALIBRATE_TAGS) + after


def report(rows: Iterable[dict]) -> str:
    """What scored rows, those with a low margin included, say about the teacher; "" where they say nothing."""
    original: list[float] = []  # position biases
    verification: list[float] = []
    verified = 0
    for row in rows:
        if usable_grades(row.get("grades_by_order")):
            original.append(position_bias(row["grades_by_order"]))
        if usable_grades(row.get("verify_grades_by_order")):
            verification.append(position_bias(row["verify_grades_by_order"]))
            verified += row["verified"] is True
    lines = [f"original pairs with both orders graded: {len(original)}; {bias_line(original)}"] if original else []
    if verification:
        share = verified / len(verification)
        lines += [
            f"verified: asked blind, the teacher prefers the edit in {verified} of {len(verification)} rows "
            f"({share:.1%}); the others have `verified` false",
            f"verification: {bias_line(verification)}",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(CaliScoreArguments, Path(__file__).parent / "configs/example.yaml", __doc__, argv)
    made_by_refine = dict.fromkeys(("teacher_response", "diagnosis", "refined_response"), REFINE_COMMAND)
    return run(
        args,
        make_work,
        stage="cali_score",
        required={"prompt": "", "chosen": "", "rejected": "", **made_by_refine},
        optional=("chosen_score", "rejected_score"),
        ranges=SCORE_RANGES,
        preview=partial(preview, args),
        input_from=REFINE_COMMAND,
        report=lambda: report(scored_rows(args.output, LOW_MARGIN)),
    )


if __name__ == "__main__":
    sys.exit(main())
