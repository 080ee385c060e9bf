"""Rows as token ids, the same for everybody who reads a response token by token: the student in training, the live
teacher, and the cache of the teacher's log-probabilities.

A generative row is `prompt_ids(...) + response_ids(...)`: prompt and response are tokenized apart and joined as ids,
so that the border between them is exact by construction (why that matters: `RewardTrainer/train/data.py`).
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING

import jinja2

from distiller.records import InputError

if TYPE_CHECKING:  # importing transformers takes seconds, and nothing here needs it
    from transformers import PreTrainedTokenizerBase

NO_THINKING = {"enable_thinking": False}  # ignored by templates that do not know it
CHAT_DATE = datetime(2024, 7, 26)
"""What a chat template that writes today's date writes here: the day that Llama 3's takes where it knows none."""


def with_fixed_date(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, whose chat template writes `CHAT_DATE` in place of today's date.

    Rows of two days would else be different tokens: a run could not be resumed after midnight, and rewards of today
    would not be those of yesterday. The date becomes part of the template, so that a model saved with the tokenizer
    keeps it, wherever it is used.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _with_fixed_date(text) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = _with_fixed_date(template)
    return tokenizer


def _with_fixed_date(template: str) -> str:
    if "strftime_now(" not in template or "macro strftime_now" in template:
        return template
    # All texts that could be a format: one may come to the call in a variable.
    words = jinja2.Environment().lex(template)
    formats = dict.fromkeys(text for _, kind, text in words if kind == "string" and "%" in text)
    # As text in quotation marks: what only looks like a format may be anything, '{%' too.
    said = {each: f"{each[0]}{CHAT_DATE.strftime(each[1:-1])}{each[0]}" for each in formats}
    dates = "".join(f"{{%- elif format == {each} -%}}{{{{- {date} -}}}}" for each, date in said.items())
    unknown = "{{- raise_exception('a date in a format that is no text of the template') -}}"
    macro = f"{{%- macro strftime_now(format) -%}}{{%- if false -%}}{dates}{{%- else -%}}{unknown}{{%- endif -%}}"
    return f"{macro}{{%- endmacro +%}}{template}"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], name: str, **template_kwargs) -> list[int]:
    """The prompt's messages in the tokenizer's chat template, up to where the answer begins. `name` is for errors."""
    return token_ids(tokenizer, render(tokenizer, prompt, name, add_generation_prompt=True, **template_kwargs))


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The response and the template's end of turn. Text that spells a special token stays ordinary text."""
    return token_ids(tokenizer, text, split_special_tokens=True) + end_of_turn(tokenizer)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], name: str, **options) -> str:
    """The conversation as text in the tokenizer's chat template; `name` is for the message of the InputError."""
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruct model, "
            "or put the template beside the tokenizer as chat_template.jinja"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as fault:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{name}: the chat template of {tokenizer.name_or_path!r} refuses a conversation of {roles}: {fault}; "
            "rewrite its prompt (a system message can go into the first user message) or leave the row out"
        ) from fault


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options) -> list[int]:
    """Ids of a rendered text: the template has written BOS already where it belongs, so none is added."""
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the template writes after an answer, up to and including its first special token ("<|im_end|>").

    Without a special token there: all of it but trailing white space, which may be nothing.
    """
    return list(_end_of_turn(tokenizer, str(tokenizer.chat_template)))


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    mark = "ANSWER"
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": mark}]
    _, found, after = render(tokenizer, messages, "a trial conversation").rpartition(mark)
    if not found:
        raise InputError(f"the chat template of {tokenizer.name_or_path!r} does not write what the assistant says")
    ids = token_ids(tokenizer, after)
    before = list(takewhile(lambda i: i not in tokenizer.added_tokens_decoder, ids))
    return tuple(ids[: len(before) + 1] if len(before) < len(ids) else token_ids(tokenizer, after.rstrip()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits for how a tokenizer cuts text; its chat template is not in it."""
    core = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    known = json.dumps([core, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()[:16]
