"""Stage 1: diagnose the rejected response of a pair and edit it as little as possible.

Reads preference pairs (`prompt`, `chosen`, `rejected`; a `teacher_response` where there is one) and writes them with

    teacher_response   the teacher's own answer y_T, asked for first where it is missing
    diagnosis          why the rejected response is worse than y_T, and what mends it
    refined_response   the rejected response with these changes and no others
    edit_similarity    share of words that stayed, in [0, 1]

Every row ends in one of three files: <output>; <output>.filtered.jsonl when the edit teaches nothing (it equals the
rejected response or y_T, kept too little of the text, has tags of the reply left in it, or max_tokens cut it);
<output>.failed.jsonl when no reply could be used. The same command goes on after an interruption. The next stage is
`python score/cali_score_vllm.py`; --then_score does it in the same engine, row by row, and writes its rows: same
result, the model loaded once and the long prompt found in the prefix cache. Its prompts and options are those of
--score_config.

    # the embedded world with its tiny teacher, on any CPU
    python refine/refine_response_vllm.py

    # the paper's setting on one GPU: Qwen3-14B and data/pairs.jsonl
    python refine/refine_response_vllm.py --config refine/configs/paper.yaml

    # both stages at once, on four engines of one GPU each
    python refine/refine_response_vllm.py --config refine/configs/paper.yaml --output data/paper/scored.jsonl \\
        --then_score --num_engines 4

    # a server instead (key from OPENAI_API_KEY)
    python refine/refine_response_vllm.py --config refine/configs/paper.yaml --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from distiller.chat import thinking_marks
from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.records import InputError, prompt_messages, response_text
from distiller.runner import Done, Failed, Filtered, RowWork, Work, ask_until
from distiller.templates import conversation_text, load_prompt
from refine import then_score
from refine.conversation import (
    REFINE_PROMPT,
    REFINE_VARIABLES,
    edit_similarity,
    read_answer,
    read_refinement,
    refine_messages,
    useless_because,
)

SCORE_CONFIG = os.path.relpath(Path(__file__).parents[1] / "score/configs/paper.yaml")
ANSWER, REFINE = 0, 1
"""Numbers of a row's asks."""


@dataclass
class RefineArguments(StageArguments):
    """Arguments of the refinement stage."""

    prompt_file: str | None = flag(
        REFINE_PROMPT, "Jinja2 file with the refinement prompt; knows prompt, rejected, teacher_response"
    )
    min_edit_similarity: float = flag(0.2, "filter edits that kept a smaller share of the words; 0 keeps all")
    then_score: bool = flag(False, "score each row right after its refinement; --output gets the rows of stage 2")
    score_config: str = flag(SCORE_CONFIG, "--then_score: YAML file of stage 2, for its prompts and scoring options")

    scoring: StageArguments | None = field(default=None, init=False)
    """Stage 2's arguments, with --then_score."""

    # The path of the configuration means nothing, what it says is in `identity`.
    NOT_IDENTITY = StageArguments.NOT_IDENTITY | {"then_score", "score_config", "scoring"}

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.min_edit_similarity <= 1:
            raise InputError(f"--min_edit_similarity {self.min_edit_similarity} is out of range (from 0 to 1)")
        if self.then_score:
            self.scoring = then_score.scoring_arguments(self, self.score_config)

    @property
    def longest_reply(self) -> int:
        return max(self.max_tokens, self.scoring.max_tokens if self.scoring else 0)

    def identity(self, stage: str, hashes: Mapping[str, str]) -> dict:
        identity = super().identity(stage, hashes)
        return identity | {"then_score": then_score.identity(self.scoring, hashes)} if self.scoring else identity


def make_work(args: RefineArguments) -> Work:
    """The stage's work on one row. Raises PromptError."""
    template = load_prompt(args.prompt_file, REFINE_VARIABLES)
    marks = thinking_marks(tuple(args.thinking_tags or ()))

    def work(row: dict) -> RowWork:
        asking = {"seed": args.seed, "row_id": row["id"], "max_tries": args.max_tries}
        rejected = response_text(row["rejected"])
        if row.get("teacher_response") is None:
            answer = yield from ask_until(prompt_messages(row["prompt"]), read_answer, number=ANSWER, **asking)
            if isinstance(answer, Failed):
                return Failed(f"teacher_response: {answer.reason}", answer.raw)
            if answer is None:
                return Filtered(row, "teacher_response cut by max_tokens")
        else:
            answer = response_text(row["teacher_response"])
        row = {**row, "teacher_response": answer}
        said = (conversation_text(prompt_messages(row["prompt"])), rejected)
        if mark := marks.left(answer, *said):
            return Filtered(row, f"thinking is left in teacher_response ({mark})")
        if answer.strip() == rejected.strip():
            return Filtered(row, "rejected equals teacher_response")

        messages = refine_messages(template, row, answer)
        read = partial(read_refinement, instructions=template.instructions, known=(rejected, answer))
        refinement = yield from ask_until(messages, read, number=REFINE, **asking)
        if isinstance(refinement, Failed):
            return refinement
        if refinement is None:
            return Filtered(row, "refinement cut by max_tokens")
        diagnosis, refined = refinement
        if mark := marks.left(refined, *said, answer):
            return Filtered(
                {**row, "diagnosis": diagnosis, "refined_response": refined}, f"thinking is left in the edit ({mark})"
            )
        similarity = edit_similarity(rejected, refined)
        row |= {"diagnosis": diagnosis, "refined_response": refined, "edit_similarity": similarity}
        reason = useless_because(rejected, refined, answer, similarity, args.min_edit_similarity)
        return Filtered(row, reason) if reason else Done(row)

    return then_score.then_score(work, args.scoring) if args.scoring else work


def preview(args: RefineArguments, row: dict) -> list[list[dict]]:
    """All conversations of a row, for --dry_run; the rejected response stands in for a teacher_response not known
    yet, and says so."""
    template = load_prompt(args.prompt_file, REFINE_VARIABLES)
    known = row.get("teacher_response") is not None
    answer = response_text(row["teacher_response"]) if known else f"(not known yet: {response_text(row['rejected'])})"
    refinement = [refine_messages(template, row, answer)]
    asked_first = [] if known else [prompt_messages(row["prompt"])]
    return asked_first + refinement + (then_score.preview(args.scoring, row, answer) if args.scoring else [])


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(RefineArguments, Path(__file__).parent / "configs/example.yaml", __doc__, argv)
    return run(
        args,
        make_work,
        stage="refine",
        required={"prompt": "", "chosen": "", "rejected": ""},
        optional=("teacher_response", *(("chosen_score", "rejected_score") if args.then_score else ())),
        ranges=then_score.cali.SCORE_RANGES if args.then_score else None,
        preview=partial(preview, args),
        report=lambda: then_score.report(args.output) if args.then_score else "",
    )


if __name__ == "__main__":
    sys.exit(main())
