"""From records to features: turn each row into tokens once. (`rows.py` reads records, `batches.py` makes batches.)

A pair becomes up to three token rows for the student, and one for the teacher:

    chosen, rejected   the whole conversation in the student's chat template, rendered as text and tokenized once
                       without added special tokens: what a stock pipeline feeds the exported model, one BOS at most
    generative         the prompt with the template's generation prompt | response tokens | the template's end of turn
    teacher            the prompt in the teacher's own template         | the same response and end-of-turn ids

How the response is found (the `|` above). Prompt and response are tokenized apart and joined as ids. Searching the
response in the tokens of the whole text instead would be a guess: a token may straddle the border, templates trim, and
a response can contain anything, the header of a turn included. Joined ids make the border exact by construction, give
student and teacher the same response ids, and are what generation sees: the prompt's tokens, then token after token.
So a response mask is a position, and no text can move it. It covers every response token once, the first and the end
of turn included. Outside are prompt, padding, what a template puts between header and answer (Qwen3's empty think
block), and what it writes after the end of turn (ChatML's newline, which a model that has stopped never says).

Text that spells a special token ("<|im_end|>" in an answer about chat templates) is not refused. In a generative
response it is split into ordinary tokens, so that the model never learns to stop there. In `chosen`, `rejected` and
prompts it becomes the special token, as in every stock pipeline: the exported model must score what it was trained on.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from distiller.records import InputError, prompt_messages, response_text
from distiller.tokens import NO_THINKING, prompt_ids, render, response_ids, token_ids
from RewardTrainer.train.rows import NUMBERS, load_mixture, load_pairs, parse_weights

__all__ = ["Dropped", "PairFeatures", "encode_pair", "encode_pairs", "load_mixture", "load_pairs", "parse_weights"]

logger = logging.getLogger(__name__)

NAMED = 10  # rows that a message names; the rest is counted

# ---------------------------------------------------------------- tokens


class PairFeatures(TypedDict):
    """One pair in tokens; every `*_input_ids` is an int32 array, and None stands for what there is not."""

    id: str
    chosen_input_ids: np.ndarray
    rejected_input_ids: np.ndarray
    margin: float | None
    chosen_score: float | None
    rejected_score: float | None
    gen_input_ids: np.ndarray | None
    gen_response_start: int | None  # index of the first response token; it and all after it are response
    teacher_input_ids: np.ndarray | None
    teacher_response_start: int | None
    prompt_tokens: int  # of the chosen row, as truncated; the header of the answer's turn is not among them
    truncated: int  # tokens taken from the prompt's left end, the same number in every row of the student
    pair_index: NotRequired[int]  # position in the list that `encode_pairs` returns
    row_index: NotRequired[int]  # position in the list that it was given


@dataclass(frozen=True)
class Dropped:
    """A pair that is not trained on: "overlong", "overlong_response" where no cut of the prompt would help (both with
    "_to_teacher" where it fits the student), or "equal_tokens" of chosen and rejected."""

    reason: str


def encode_pairs(rows: Sequence[dict], *arguments, **options) -> tuple[list[PairFeatures], Counter]:
    """`encode_pair` for every row: (features, counts of "pairs", of "truncated" and of each reason).

    Each feature also has `pair_index`, its position in the list, and `row_index`, that of its row. A row that is there
    several times (as the same object) is encoded once. Raises InputError if rows were given and none left.
    """
    features, counts, encoded, equal = [], Counter(pairs=0, truncated=0), {}, {}
    for index, row in enumerate(rows):
        if id(row) not in encoded:
            encoded[id(row)] = encode_pair(row, *arguments, **options)
        pair = encoded[id(row)]
        if isinstance(pair, Dropped):
            counts[pair.reason] += 1
            if pair.reason == "equal_tokens":
                equal[id(row)] = str(row["id"])
            continue
        counts["truncated"] += pair["truncated"] > 0
        features.append({**pair, "pair_index": len(features), "row_index": index})
    counts["pairs"] = len(features)
    template = "what differs may be something that the student's chat template leaves out, such as <think>...</think>"
    if equal:
        named = ", ".join(list(equal.values())[:NAMED]) + (", ..." if len(equal) > NAMED else "")
        logger.warning(
            "%d pairs left out, whose chosen and rejected rows are equal tokens: %s; %s", len(equal), named, template
        )
    if rows and not features:
        reasons = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        of_teacher = sum(count for name, count in counts.items() if name.endswith("_to_teacher"))
        remedy = "raise --max_length, where the student takes more"
        if len(rows) in (counts["equal_tokens"], of_teacher):
            remedy = template if counts["equal_tokens"] else "take a teacher with a longer context"
        raise InputError(f"0 of {len(rows)} pairs can be used ({reasons}): {remedy}")
    return features, counts


def encode_pair(
    row: Mapping,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    generative: Literal["chosen", "teacher_response"] | None = None,
    max_length: int | None = None,
    overlong: Literal["drop", "truncate_prompt", "error"] = "drop",
    teacher_max_length: int | None = None,
    teacher_chat_template_kwargs: Mapping = NO_THINKING,
    student_chat_template_kwargs: Mapping = NO_THINKING,
) -> PairFeatures | Dropped:
    """The token rows of one record; see the module docstring for what they are.

    generative: the field whose text the language-model terms are computed on; None for none.
    teacher_tokenizer: adds the teacher's row; needs `generative`.
    max_length: longest row of the student, in tokens; None for no limit.
    teacher_max_length: longest row of the teacher.
    overlong: what happens to a pair with a longer row. "truncate_prompt" takes the same number of tokens from the left
        end of the prompt in all rows, so that chosen and rejected are compared under one prompt; a leading BOS stays,
        and no response token goes. The teacher then sees as many prompt tokens as the student.
    *_chat_template_kwargs: for rendering the prompts of generative rows. Reward rows are rendered without, as stock.

    Raises InputError for a tokenizer without chat template, for one whose padding token ends a conversation, for a
    conversation the template refuses, and with overlong="error" for a pair over max_length.
    """
    if teacher_tokenizer is not None and generative is None:
        raise ValueError("a teacher row needs a generative field")
    prompt, name = prompt_messages(row["prompt"]), f"row {row['id']}"
    rows = {}
    for side in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": response_text(row[side])}
        rows[side] = token_ids(student_tokenizer, render(student_tokenizer, [*prompt, answer], name))
    if rows["chosen"] == rows["rejected"]:
        return Dropped("equal_tokens")
    if rows["chosen"][-1] == student_tokenizer.pad_token_id:
        raise InputError(
            f"the chat template of {student_tokenizer.name_or_path!r} ends a conversation with the padding token "
            f"{student_tokenizer.pad_token!r}: stock pipelines, which read the reward at the last token that is not "
            "padding, would read it elsewhere than training; give the tokenizer another pad_token"
        )
    prompt_only = token_ids(student_tokenizer, render(student_tokenizer, prompt, name))
    prompt_length = _common_prefix(prompt_only, rows["chosen"])
    start = teacher_prompt = response = None
    teacher_cut = 0
    if generative is not None:
        student_prompt = prompt_ids(student_tokenizer, prompt, name, **student_chat_template_kwargs)
        response = response_ids(student_tokenizer, response_text(row[generative]))
        rows["gen"], start = student_prompt + response, len(student_prompt)
    if teacher_tokenizer is not None:
        teacher_prompt = prompt_ids(teacher_tokenizer, prompt, name, **teacher_chat_template_kwargs)

    excess = max(len(ids) for ids in rows.values()) - max_length if max_length is not None else 0
    too_long = f"{max_length + excess} tokens, more than --max_length {max_length}; raise it" if excess > 0 else None
    place = "" if too_long else "_to_teacher"
    if teacher_max_length is not None and len(teacher_prompt) + len(response) > teacher_max_length:
        seen = len(teacher_prompt) + len(response)
        too_long = too_long or f"{seen} tokens to the teacher, which takes {teacher_max_length}; leave it out"
        excess = max(excess, len(rows["gen"]) - teacher_max_length)  # it is cut to as many tokens as the student's
    excess = max(excess, 0)
    if too_long:
        if overlong == "error":
            raise InputError(f"{name} has {too_long}, or use --overlong drop or --overlong truncate_prompt")
        if overlong == "drop":
            return Dropped("overlong" + place)
        # Only what comes before the assistant's turn may go, and never all of it: a response cannot start at 0.
        if excess > min(_common_prefix(prompt_only, ids) for ids in rows.values()) - 1:
            return Dropped("overlong_response" + place)
        rows = {side: _cut_left(student_tokenizer, ids, excess) for side, ids in rows.items()}
        if start is not None:
            start -= excess
        if teacher_prompt is not None and len(teacher_prompt) > start:
            teacher_cut = len(teacher_prompt) - start
            teacher_prompt = _cut_left(teacher_tokenizer, teacher_prompt, teacher_cut)

    def array(ids: list[int] | None) -> np.ndarray | None:
        return None if ids is None else np.array(ids, dtype=np.int32)

    return PairFeatures(
        id=row["id"],
        chosen_input_ids=array(rows["chosen"]),
        rejected_input_ids=array(rows["rejected"]),
        **{number: row.get(number) for number in NUMBERS},
        gen_input_ids=array(rows.get("gen")),
        gen_response_start=start,
        teacher_input_ids=array(None if teacher_prompt is None else teacher_prompt + response),
        teacher_response_start=None if teacher_prompt is None else len(teacher_prompt),
        prompt_tokens=prompt_length - excess,
        truncated=excess or teacher_cut,
    )


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], count: int) -> list[int]:
    """Without the first `count` tokens; a leading BOS stays, and the tokens after it go."""
    keep = 1 if ids[0] == tokenizer.bos_token_id else 0
    return ids[:keep] + ids[keep + count :]
