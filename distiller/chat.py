"""What every teacher engine does to a conversation on its way in and to a reply on its way out. Pure, no model.

Thinking is told from the answer by position, never by a search through the whole reply: an answer may quote
`</think>` (the response being refined can contain anything), so that a tag counts only where a chat template or a
model puts it.
"""

from __future__ import annotations

import re

from distiller.engine import AskError

OPEN, CLOSE = "<think>", "</think>"
ROLES = ("system", "user", "assistant")

_CLOSE_ON_A_LINE = re.compile(r"^[ \t]*</think>[ \t]*$", re.MULTILINE)


def check_messages(messages: list[dict]) -> None:
    """Refuse what an engine would swallow in silence or die of.

    vLLM renders `content: null` as an empty turn, a chat template renders an empty list as an empty prompt, and a lone
    surrogate (legal in JSON as `"\\ud800"`) cannot be encoded by any tokenizer. Raises AskError.
    """
    if not messages:
        raise AskError("the conversation is empty")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise AskError(f"message {index}: role {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise AskError(f"message {index} ({role}): content must be a string, not {type(content).__name__}")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise AskError(f"message {index} ({role}): content is not valid Unicode: {error.reason}") from None
    if messages[-1]["role"] == "assistant":
        raise AskError("the conversation ends with an assistant message: there is nothing to answer")
    if not messages[-1]["content"].strip():
        raise AskError("the last message is empty: there is nothing to answer")


def split_thinking(reply: str, opened: bool | None = False) -> tuple[str, str | None]:
    """Split a raw reply into (answer, thinking); thinking is None where the reply holds none.

    `opened` says whether the prompt itself ended with `<think>` (some templates do that, and the reply then starts
    inside the thinking): True, False, or None where the prompt is unknown, as behind a server. With None a reply
    without `<think>` has thinking only if `</think>` stands alone on a line, the way models write it and prose hardly
    ever does.

    A reply cut inside its thinking has an empty answer. A reply without thinking is returned unchanged.
    """
    body = reply.lstrip()
    if body.startswith(OPEN):
        thinking, closed, answer = body[len(OPEN) :].partition(CLOSE)
    elif opened:
        thinking, closed, answer = reply.partition(CLOSE)
    elif opened is None and (alone := _CLOSE_ON_A_LINE.search(reply)):
        thinking, closed, answer = reply[: alone.start()], CLOSE, reply[alone.end() :]
    else:
        return reply, None
    # An empty block is what a template with thinking off looks like when the model writes it itself: no thinking.
    return (answer.lstrip() if closed else ""), (thinking.strip() or None)
