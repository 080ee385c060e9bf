"""Before stage 1, for who has only prompts: a model answers each of them.

Reads rows with a `prompt` and writes one file a model, each row with

    response   the model's answer, verbatim
    model      its name

beside the row's own fields and its `id`, by which `score/score_orig_vllm.py --responses file file ...` joins the files
of several models to pairs. With --as_teacher_response the answer becomes the row's `teacher_response`, which saves
refine_response_vllm.py that ask. With --num_responses N a row gets a list of N, `responses`, each drawn with a seed of
its own: candidates for `RewardTrainer.eval.best_of_n`. An answer that max_tokens cut goes to <output>.filtered.jsonl
(of several, a row without any whole one), a row without an answer to <output>.failed.jsonl. The same command goes on
after an interruption.

    # the prompts of the embedded world, on any CPU
    python refine/generate_response_vllm.py

    # one candidate model on one GPU
    python refine/generate_response_vllm.py --config refine/configs/generate_paper.yaml \\
        --model Qwen/Qwen2.5-7B-Instruct --output data/responses/qwen2.5-7b.jsonl

    # a server instead (key from OPENAI_API_KEY)
    python refine/generate_response_vllm.py --config refine/configs/generate_paper.yaml \\
        --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from distiller.chat import thinking_marks
from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.records import InputError, prompt_messages
from distiller.runner import Done, Failed, Filtered, RowWork, Work, ask_until
from distiller.templates import conversation_text
from refine.conversation import read_answer


@dataclass
class GenerateArguments(StageArguments):
    """Arguments of the generation stage."""

    prompt_file: str | None = flag(None, "not for this command: a prompt is asked as it is")
    as_teacher_response: bool = flag(False, "write the answer as teacher_response, in place of response and model")
    num_responses: int | None = flag(None, "so many answers to each prompt, as a list: `responses`, not `response`")

    RANGES: ClassVar[Mapping[str, tuple[float, float | None]]] = {**StageArguments.RANGES, "num_responses": (1, None)}

    def validate(self) -> None:
        super().validate()
        if self.num_responses and self.as_teacher_response:
            raise InputError("--num_responses and --as_teacher_response exclude each other: a row has one y_T")
        if (self.num_responses or 1) > 1 and self.temperature == 0:
            raise InputError("--num_responses with --temperature 0 would draw the same answer again and again")
        if self.prompt_file:
            raise InputError("--prompt_file has no use here: each prompt is asked as it is, by its own messages alone")


def make_work(args: GenerateArguments) -> Work:
    """The stage's work on one row."""
    marks = thinking_marks(tuple(args.thinking_tags or ()))

    def work(row: dict) -> RowWork:
        messages = prompt_messages(row["prompt"])
        if args.num_responses:
            return (yield from several(row, messages))
        answer = yield from ask_until(
            messages, read_answer, seed=args.seed, row_id=row["id"], max_tries=args.max_tries
        )
        if isinstance(answer, Failed):
            return answer
        if answer is None:
            return Filtered(row, "response cut by max_tokens")
        if mark := marks.left(answer, conversation_text(messages)):
            return Filtered({**row, "response": answer}, f"thinking is left in the response ({mark})")
        if args.as_teacher_response:
            return Done({**row, "teacher_response": answer})
        return Done({**row, "response": answer, "model": args.model})

    def several(row: dict, messages: list[dict]) -> RowWork:
        answers = []
        for number in range(args.num_responses):
            answer = yield from ask_until(
                messages, read_answer, seed=args.seed, row_id=row["id"], number=number, max_tries=args.max_tries
            )
            if isinstance(answer, Failed):
                return answer
            answers.append(answer)
        whole = [answer for answer in answers if answer and not marks.left(answer, conversation_text(messages))]
        if not whole:
            return Filtered(row, "every response cut by max_tokens, or with thinking left in it")
        return Done({**row, "responses": whole, "model": args.model})

    return work


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(GenerateArguments, Path(__file__).parent / "configs/generate_example.yaml", __doc__, argv)
    return run(args, make_work, stage="generate", required={"prompt": ""})


if __name__ == "__main__":
    sys.exit(main())
