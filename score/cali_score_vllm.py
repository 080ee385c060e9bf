"""Stage 2: the teacher scores its own edit, knowing what the response was given before; the difference is the margin.

Reads what refine_response_vllm.py wrote and writes the training set, at once a TRL preference dataset with margins:

    chosen, chosen_score               the refined response, and the teacher's own score s of it, from 1 to 10
    rejected, rejected_score           the rejected response and its score s_l
    margin                             s - s_l
    original_chosen, ..._score         what `chosen` was before refinement

For s the refinement conversation goes on: the teacher reads its own diagnosis and edit, is told s_l, and grades the
edit on that scale; --score_mode mean averages n grades. Where a row has no rejected_score, the original pair is scored
first, as score_orig_vllm.py does it. --refine_prompt_file must be the file stage 1 used, since its prompt is a part of
the conversation; where the manifest of stage 1 lies beside the input, this is checked.

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

import sys
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.engine import Ask, AskError, Completion
from distiller.manifest import Manifest, hash_file
from distiller.records import InputError, response_text
from distiller.runner import Done, Failed, Filtered, RowWork, Work, ask_until
from distiller.templates import PromptTemplate, load_prompt
from refine.conversation import REFINE_PROMPT, REFINE_VARIABLES, refine_messages
from score.conversation import (
    CALIBRATE_PROMPT,
    CALIBRATE_VARIABLES,
    HIGHEST,
    LOWEST,
    STRENGTH_PROMPT,
    STRENGTH_VARIABLES,
    both_orders,
    calibration_messages,
    grade_in_both_orders,
    read_score,
    score_text,
    strength_messages,
)

REFINE_COMMAND = "python refine/refine_response_vllm.py"
CALIBRATE = 2
"""Number of a row's first self-calibrated ask; those before it are the two orders of the strength."""


@dataclass
class CaliScoreArguments(StageArguments):
    """Arguments of the self-calibrated scoring."""

    prompt_file: str | None = flag(CALIBRATE_PROMPT, "Jinja2 file with the calibration prompt; knows rejected_score")
    strength_prompt_file: str = flag(STRENGTH_PROMPT, "prompt for the strength of original pairs without scores")
    refine_prompt_file: str = flag(REFINE_PROMPT, "the prompt file the refinement stage used")
    min_margin: float = flag(0.0, "filter pairs with this margin or a smaller one")
    score_mode: Literal["sample", "mean"] = flag("sample", "sample: one grade; mean: of num_score_samples grades")
    num_score_samples: int = flag(8, "grades averaged by --score_mode mean")

    PROMPT_FIELDS = ("prompt_file", "strength_prompt_file", "refine_prompt_file")

    def validate(self) -> None:
        super().validate()
        if self.num_score_samples < 1:
            raise InputError(f"--num_score_samples {self.num_score_samples} is out of range (from 1)")
        check_refinement(self)


def check_refinement(args: CaliScoreArguments) -> None:
    """Compare with the manifest beside the input, if there is one: another prompt is refused, another teacher is said
    aloud."""
    manifest = Manifest.load(Path(f"{args.input}.manifest.json"))
    identity = manifest.identity if manifest else {}
    while identity.get("stage") == "filter":  # filter_pairs.py leaves the rows as they are
        identity = identity.get("input_manifest") or {}
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
    samples = args.num_score_samples if args.score_mode == "mean" else 1

    def work(row: dict) -> RowWork:
        if row.get("rejected_score") is None:
            chosen, rejected = response_text(row["chosen"]), response_text(row["rejected"])
            grades = yield from grade_in_both_orders(
                strength, row, chosen, rejected, seed=args.seed, max_tries=args.max_tries
            )
            if isinstance(grades, Failed):
                return grades
            chosen_score, rejected_score = both_orders(grades)
            row = {**row, "chosen_score": chosen_score, "rejected_score": rejected_score, "grades_by_order": grades}

        messages = calibrated_messages(refinement, calibrate, row, row["rejected_score"])
        score = yield from mean_score(messages, samples, args, row["id"])
        if isinstance(score, Failed):
            return score
        row = scored_record(row, score)
        return Filtered(row, "margin not over min_margin") if row["margin"] <= args.min_margin else Done(row)

    return work


def calibrated_messages(
    refinement: PromptTemplate, calibrate: PromptTemplate, row: dict, rejected_score: float
) -> list[dict]:
    """The refinement conversation of the row, and the question for a score of the edit. Raises PromptError."""
    asked = refine_messages(refinement, row, response_text(row["teacher_response"]))[0]["content"]
    question = calibrate.render(rejected_score=score_text(rejected_score))
    return calibration_messages(asked, row["diagnosis"], response_text(row["refined_response"]), question)


def mean_score(
    messages: list[dict], samples: int, args: CaliScoreArguments, row_id: str
) -> Generator[Ask, Completion | AskError, float | Failed]:
    """Mean of `samples` grades, each drawn with a seed of its own; one that cannot be had fails them all."""
    total = 0.0
    for sample in range(samples):
        number = CALIBRATE + sample
        score = yield from ask_until(
            messages, read_score, seed=args.seed, row_id=row_id, number=number, max_tries=args.max_tries
        )
        if isinstance(score, Failed):
            return Failed(f"calibrated score: {score.reason}", score.raw)
        total += score
    return total / samples


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
    conversations = []
    rejected_score = row.get("rejected_score")
    if rejected_score is None:
        strength = load_prompt(args.strength_prompt_file, STRENGTH_VARIABLES)
        pair = (response_text(row["chosen"]), response_text(row["rejected"]))
        conversations = [strength_messages(strength, row["prompt"], *order) for order in (pair, pair[::-1])]
        rejected_score = 5
    refinement = load_prompt(args.refine_prompt_file, REFINE_VARIABLES)
    calibrate = load_prompt(args.prompt_file, CALIBRATE_VARIABLES)
    samples = args.num_score_samples if args.score_mode == "mean" else 1
    return conversations + [calibrated_messages(refinement, calibrate, row, rejected_score)] * samples


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(CaliScoreArguments, Path(__file__).parent / "configs/example.yaml", __doc__, argv)
    made_by_refine = dict.fromkeys(("teacher_response", "diagnosis", "refined_response"), REFINE_COMMAND)
    return run(
        args,
        make_work,
        stage="cali_score",
        required={"prompt": "", "chosen": "", "rejected": "", **made_by_refine},
        optional=("chosen_score", "rejected_score"),
        ranges={"rejected_score": (LOWEST, HIGHEST)},
        preview=partial(preview, args),
        input_from=REFINE_COMMAND,
    )


if __name__ == "__main__":
    sys.exit(main())
