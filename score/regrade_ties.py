"""After score_orig_vllm.py: pairs with equal scores are asked again, and dropped if they stay equal.

Reads scored pairs (the output of score_orig_vllm.py; with --responses, of a run with --ties keep, since it drops its
ties otherwise) and writes them all, but for the ties that stay:

- a pair whose scores differ by more than --tie_tolerance passes through unchanged;
- a tie is graded --turns times more, in both orders and with seeds of its own, and all its grades count:
  `chosen_score`, `rejected_score` and `grades_by_order` are written anew. If the scores now differ by more than the
  tolerance, the pair is kept. Where they decide which response is chosen (`chosen_by` is "teacher"), the two change
  places when the other one turned out better; a label is never changed;
- what is still a tie goes to <output>.filtered.jsonl, or is kept with --ties keep.

Grades can only differ from those before where the teacher samples: --temperature 0 asks in vain. Grade as
score_orig_vllm.py did, with the same model, prompt file and --score_mode; where its manifest lies beside the input,
this is checked. A row without usable grades goes to <output>.failed.jsonl. The same command goes on after an
interruption.

    # the pairs of the embedded world, after score/score_orig_vllm.py
    python score/regrade_ties.py

    # with the paper's teacher on one GPU, scores half a point apart counted as ties
    python score/regrade_ties.py --config score/configs/ties_paper.yaml --tie_tolerance 0.5

    # a server instead (key from OPENAI_API_KEY)
    python score/regrade_ties.py --config score/configs/ties_paper.yaml --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from distiller.cli import flag, parse_stage_args, run
from distiller.manifest import hash_file, identity_before_filters
from distiller.records import BadRow, InputError, parse_columns, read_rows, response_text
from distiller.runner import Done, Failed, Filtered, RowWork, Work
from distiller.templates import load_prompt
from score.conversation import (
    HIGHEST,
    LOWEST,
    STRENGTH_PROMPT,
    STRENGTH_TAGS,
    STRENGTH_VARIABLES,
    TIE,
    exchanged,
    strength_messages,
    usable_grades,
    with_scores,
)
from score.grading import ScoreArguments, grade_in_both_orders, previewed, scored_rows

SCORE_COMMAND = "python score/score_orig_vllm.py"


@dataclass
class RegradeArguments(ScoreArguments):
    """Arguments of the regrading of ties."""

    prompt_file: str | None = flag(STRENGTH_PROMPT, "the strength prompt the pairs were scored with")
    tie_tolerance: float = flag(0.0, "scores that differ by no more than this are a tie")
    turns: int = flag(3, "how often a tie is graded again, each time in both orders")
    ties: Literal["drop", "keep"] = flag("drop", "what becomes of a pair that is still a tie")

    def validate(self) -> None:
        super().validate()
        for name, least in (("tie_tolerance", 0), ("turns", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"--{name} {getattr(self, name)} is out of range (from {least})")
        check_scoring(self)


def check_scoring(args: RegradeArguments) -> None:
    """Compare with the manifest beside the input, if there is one: grades of another kind are refused, those of
    another teacher are said aloud."""
    before = identity_before_filters(args.input)
    if before.get("stage") not in ("score_orig", "regrade_ties"):
        return
    if Path(args.prompt_file).is_file() and before["prompts"]["prompt_file"] != [hash_file(args.prompt_file)]:
        raise InputError(
            f"{args.input} was scored with another prompt than {args.prompt_file}, and grades of both would be "
            "averaged; name the file of that run with --prompt_file"
        )
    if before["options"]["score_mode"] != args.score_mode:
        raise InputError(
            f"{args.input} was scored with --score_mode {before['options']['score_mode']}, not {args.score_mode}, and "
            "grades of both would be averaged; give that one"
        )
    if before["model"] != args.model:
        print(
            f"warning: {args.input} was scored by {before['model']} and is regraded by {args.model}", file=sys.stderr
        )


def is_tie(args: RegradeArguments, row: dict) -> bool:
    return abs(row["chosen_score"] - row["rejected_score"]) <= args.tie_tolerance


def make_work(args: RegradeArguments) -> Work:
    """The stage's work on one row. Raises PromptError."""
    template = load_prompt(args.prompt_file, STRENGTH_VARIABLES)

    def work(row: dict) -> RowWork:
        if row.get("original_chosen") is not None:  # its grades are not those of the `chosen` it has now
            return Failed("the row was scored as an edit by cali_score_vllm.py: only original pairs are regraded")
        if not is_tie(args, row):
            return Done(row)
        grades = row["grades_by_order"]
        if not usable_grades(grades):
            return Failed("field `grades_by_order` is not a list of pairs of grades, an even number of them")
        pair = (response_text(row["chosen"]), response_text(row["rejected"]))
        # Numbered from the grades there are, so that no seed of the scoring comes again. All turns are asked, also
        # where the first one breaks the tie: who stops at the first difference keeps the chance one.
        more = yield from grade_in_both_orders(
            args, template, row, *pair, number=len(grades), turns=args.turns * args.samples
        )
        if isinstance(more, Failed):
            return more
        row = with_scores(row, [*grades, *more])
        if row.get("chosen_by") == "teacher" and row["rejected_score"] > row["chosen_score"]:
            row = exchanged(row)
        return Filtered(row, TIE) if args.ties == "drop" and is_tie(args, row) else Done(row)

    return work


def preview(args: RegradeArguments, row: dict) -> list[list[dict]]:
    """The conversations of a tie, for --dry_run."""
    if not is_tie(args, row):
        return []
    template = load_prompt(args.prompt_file, STRENGTH_VARIABLES)
    pair = (response_text(row["chosen"]), response_text(row["rejected"]))
    conversations = [strength_messages(template, row["prompt"], *order) for order in (pair, pair[::-1])]
    return previewed(args, conversations * args.turns * args.samples, STRENGTH_TAGS)


def report(args: RegradeArguments, before: Iterable[dict | BadRow], after: Iterable[dict]) -> str:
    """How many ties there were in the input, and how many are left."""
    ties = {row["id"] for row in before if isinstance(row, dict) and is_tie(args, row)}
    finished = [row for row in after if row["id"] in ties]
    left = sum(is_tie(args, row) for row in finished)
    said = {"drop": "dropped", "keep": "kept"}[args.ties]
    return f"ties: {len(finished)} regraded, {len(finished) - left} of them no ties any more, {left} {said}"


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(RegradeArguments, Path(__file__).parent / "configs/ties_example.yaml", __doc__, argv)
    scored = dict.fromkeys(("chosen_score", "rejected_score", "grades_by_order"), SCORE_COMMAND)
    required = {"prompt": "", "chosen": "", "rejected": "", **scored}
    scale = dict.fromkeys(("chosen_score", "rejected_score"), (LOWEST, HIGHEST))

    def said() -> str:
        before = read_rows(args.input, parse_columns(args.columns), args.limit, required=required, ranges=scale)
        return report(args, before, scored_rows(args.output, TIE))

    return run(
        args,
        make_work,
        stage="regrade_ties",
        required=required,
        ranges=scale,
        preview=partial(preview, args),
        input_from=SCORE_COMMAND,
        report=said,
    )


if __name__ == "__main__":
    sys.exit(main())
