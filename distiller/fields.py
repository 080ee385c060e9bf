"""What a field of the record must look like, and how its two forms (a text, TRL's list of messages) become one.

Every refusal is an `Unfit`: what is wrong, in the same words for the same fault so that faults can be counted, and
what to do about it.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress

from distiller.sources import InputError

RESPONSE_FIELDS = ("chosen", "rejected", "response", "teacher_response", "refined_response", "original_chosen")
NUMBER_FIELDS = ("chosen_score", "rejected_score", "original_chosen_score", "margin", "edit_similarity")
TEXT_FIELDS = ("diagnosis",)
ROLES = ("system", "user", "assistant")
NOT_PASSED_ON = ("image", "images", "videos", "audio", "tools", "functions")
"""Usual names of what a teacher or a student would have to see beside the text."""
NOTHING = ("", "[]", "{}", "null", "none")
NOTHING_IN_IT = "fill it in, or leave the row out"
_MESSAGES_PRINTED = re.compile(r"\s*\[\s*\{\s*'(?:role|content)'")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_FLOAT_ID = re.compile(r"\d+\.0")  # as pandas writes a number where another is missing
_FROM = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's names of roles."""
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
MESSAGES_FORM = 'write a text, or [{"role": "user", "content": "..."}, ...]'


class Unfit(InputError):
    """A line or a value that cannot be used: `reason`, the same words for the same fault, and `remedy`."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy

    def within(self, name: str) -> Unfit:
        """The same of a field."""
        return Unfit(f"field `{name}` {self.reason}", self.remedy)


def check_field(name: str, value: object, limits: tuple[float, float] | None) -> None:
    """Raises Unfit."""
    if name == "prompt":
        prompt_messages(value)
    elif name in RESPONSE_FIELDS:
        response_text(value)
    elif name in TEXT_FIELDS and not isinstance(value, str):
        raise Unfit("must be a string", f"it is {kind_of(value)}: write a text")
    elif name in NUMBER_FIELDS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            remedy = f"it is {value!r:.40}: write it without quotation marks, or leave it out"
            raise Unfit(f"must be a number, not {kind_of(value)}", remedy)
        if abs(value) > sys.float_info.max:  # JSON integers have no limit
            raise Unfit("is too large for a number", "leave it out, or correct it")
        if limits and not limits[0] <= value <= limits[1]:
            remedy = f"it is {value}: bring it to that scale, or leave it out to have it made"
            raise Unfit(f"is outside [{limits[0]:g}, {limits[1]:g}]", remedy)


def prompt_messages(prompt: str | list[dict]) -> list[dict]:
    """`[{"role", "content"}, ...]`: a string is one user message, a list is checked and copied. Raises InputError."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = _messages(prompt)
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise Unfit("has a system message that is not the first", "put it first, or make it part of a user's")
    if "user" not in roles:
        raise Unfit("has no user message", "add the message that is to be answered")
    if roles[-1] == "assistant":
        raise Unfit(
            "ends with an assistant message: there is nothing left to answer",
            "drop that message, or move it to the response",
        )
    if not messages[-1]["content"].strip():
        raise Unfit("is empty", NOTHING_IN_IT)
    return messages


def response_text(response: str | list[dict]) -> str:
    """The text of a response: itself, or that of `[{"role": "assistant", "content": text}]`. Raises InputError."""
    if not isinstance(response, str):
        messages = _messages(response)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise Unfit(
                "must be one assistant message",
                'write a text or [{"role": "assistant", "content": "..."}]; turns before it belong in `prompt`',
            )
        response = messages[0]["content"]
    if not response.strip():
        raise Unfit("is empty", NOTHING_IN_IT)
    return _text(response)


def read_cells(row: dict) -> None:
    """Make numbers and lists of messages of what CSV has as text, in place; all else stays the text that it is.
    Raises Unfit for messages that are no JSON."""
    for name in NUMBER_FIELDS:
        if isinstance(row.get(name), str):
            with suppress(ValueError):
                row[name] = float(row[name])
    if isinstance(row.get("id"), str) and _FLOAT_ID.fullmatch(row["id"]):
        row["id"] = row["id"].removesuffix(".0")
    for name in ("prompt", *RESPONSE_FIELDS):
        cell = row.get(name)
        if isinstance(cell, str) and cell.lstrip().startswith("["):
            with suppress(ValueError, RecursionError):
                value = json.loads(cell)
                if value and all(isinstance(part, dict) and "role" in part for part in value):
                    row[name] = value
            if row[name] is cell and _MESSAGES_PRINTED.match(cell):
                remedy = "save messages as JSON (or the table as JSONL or Parquet), not as Python prints them"
                raise Unfit(f"field `{name}` is a list as text, and no JSON", remedy)


def read_sharegpt(row: dict) -> None:
    """Messages of ShareGPT's form (`from`, `value`) become ours, in place; so does a single one as a response."""
    for name in ("prompt", "messages", *RESPONSE_FIELDS):
        value = row.get(name)
        turns = [value] if isinstance(value, dict) and name in RESPONSE_FIELDS else value
        if isinstance(turns, list) and turns and all(_is_sharegpt(turn) for turn in turns):
            row[name] = [{"role": _FROM[turn["from"]], "content": turn["value"]} for turn in turns]


def _is_sharegpt(turn: object) -> bool:
    return isinstance(turn, dict) and "value" in turn and isinstance(turn.get("from"), str) and turn["from"] in _FROM


def _dialogue(text: object) -> list[dict] | None:
    """Messages of `Human: ...\n\nAssistant: ...`, as HH-RLHF has them; None for any other value."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    _, *parts = _TURN.split(text.strip())
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _TURN_ROLES[speaker], "content": said.strip()} for speaker, said in turns]


def _read_dialogues(row: dict) -> None:
    """Whole dialogues as text become messages, in place: a prompt that ends where the assistant is to speak, and
    responses that begin with it or, where there is no prompt, both."""
    both = {name: _dialogue(row.get(name)) for name in ("chosen", "rejected")}
    if row.get("prompt") is None:
        if None not in both.values():
            row |= both
        return
    prompt = _dialogue(row["prompt"])
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        prompt.pop()
    if prompt and prompt[-1]["role"] == "user":
        row["prompt"] = prompt
        row |= {name: turns for name, turns in both.items() if turns and turns[:-1] == prompt}


def split_conversations(row: dict) -> None:
    """Turn whole conversations in `chosen` / `rejected`, messages or text, into `prompt` and one assistant message
    each, in place.

    Beside a `prompt` that they do not begin with they are left as they are: a stage that needs them will say so.
    Raises Unfit.
    """
    for name in NOT_PASSED_ON:
        value = row.get(name)
        if value and not (isinstance(value, str) and value.strip().casefold() in NOTHING):
            raise Unfit(f"field `{name}` is not passed on", "only text is: empty the field, or leave the row out")
    _read_dialogues(row)
    whole = {}
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), list) and len(row[name]) > 1:
            try:
                whole[name] = _messages(row[name])
            except Unfit as fault:
                raise fault.within(name) from fault
    if row.get("prompt") is None and whole:
        first, *others = whole.values()
        size = min(len(messages) for messages in whole.values()) - 1
        for other in others:
            size = next((i for i in range(size) if first[i] != other[i]), size)
        if not size:
            raise Unfit("fields `chosen` and `rejected` have no prompt in common", "give the row a `prompt`")
        if any(len(messages) > size + 1 for messages in whole.values()):
            remedy = "which of their turns is to be compared? cut both behind it, or leave the row out"
            raise Unfit("fields `chosen` and `rejected` part before the last turn", remedy)
        row["prompt"] = first[:size]
    try:
        prompt = prompt_messages(row["prompt"]) if whole else []
    except Unfit as fault:
        raise fault.within("prompt") from fault
    for name, messages in whole.items():
        if messages[:-1] == prompt:
            row[name] = messages[-1:]


def _messages(value: object) -> list[dict]:
    """A copy with role and content alone. Raises Unfit."""
    if not isinstance(value, list):
        raise Unfit(f"must be a string or a list of messages, not {kind_of(value)}", MESSAGES_FORM)
    if not value:
        raise Unfit("is empty", NOTHING_IN_IT)
    messages = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("tool", "function"):
            raise Unfit(f"has a {role} message", "tool use is not supported: tell it as text, or leave the row out")
        if isinstance(message, dict) and any(message.get(name) for name in NOT_PASSED_ON):
            raise Unfit("has more than text", "only text is passed on: take it out, or leave the row out")
        if isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call")):
            raise Unfit("has tool calls", "tool use is not supported: tell it as text, or leave the row out")
        if role == "developer":
            raise Unfit("has a developer message", 'write "system", which is what chat templates call it')
        if role not in ROLES:
            raise Unfit(f"has a message without a role out of {', '.join(ROLES)}", MESSAGES_FORM)
        messages.append({"role": role, "content": _text(content_text(message.get("content")))})
    return messages


def content_text(content: object) -> str:
    """A message's text; of OpenAI's content parts those of text, one after the other. Raises Unfit."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) and content else [None]
    if all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        return "".join(part["text"] for part in parts)
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)} - {"text"}
    what = f"it has parts of type {', '.join(sorted(kinds))}" if kinds else f"it is {kind_of(content)}"
    raise Unfit("has a message whose content is not text", f"{what}: give a text; images are not supported")


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:  # tokenizers and servers take UTF-8 alone
        remedy = f"character {fault.start + 1} is half of a pair: write the whole character, or drop it"
        raise Unfit("has a lone surrogate, which is no character", remedy) from fault
    return text


def kind_of(value: object) -> str:
    """What JSON calls a value of this type."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    return {str: "a string", dict: "an object", list: "a list"}.get(type(value), "a number")
