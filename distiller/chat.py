"""What every teacher engine does to a conversation on its way in and to a reply on its way out. Pure, no model.

Thinking is told from the answer by position, never by a search through the whole reply: an answer may quote
`</think>` (the response being refined can contain anything), so that a tag counts only where a chat template or a
model puts it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from distiller.engine import AskError

THINKING = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
ROLES = ("system", "user", "assistant")


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


@dataclass(frozen=True)
class ThinkingMarks:
    """How a teacher marks its thinking: `<name>...</name>`, `[NAME]...[/NAME]` or Kimi's triangles around the names,
    in any case; OpenThinker's `<|begin_of_thought|>`; a channel of the harmony format (gpt-oss), which ends where the
    next one begins."""

    opening: re.Pattern
    closing: re.Pattern
    alone: re.Pattern
    """A closing mark that stands alone on its line."""
    sure: frozenset[str]
    """Names that always mean thinking; another one is part of the answer where the conversation speaks of it."""

    def split(
        self, reply: str, opened: str | None = "", *, messages: Sequence[dict] = (), cut: bool = False
    ) -> tuple[str, str | None]:
        """Split a raw reply into (answer, thinking); thinking is None where the reply holds none.

        `opened` is the opening mark that the prompt itself ended with (some templates do that, and the reply then
        starts inside the thinking), "" where there is none, None where the prompt is unknown, as behind a server. With
        None a reply that begins otherwise has thinking only if a closing mark, which nothing in the reply opens,
        stands alone on a line, the way models write it and prose hardly ever does. `messages` is what the reply
        answers: a prompt may ask for `<reasoning>` as part of the answer. `cut` says that max_tokens ended the reply.

        Several blocks one after the other are all thinking. A reply cut inside its thinking has an empty answer. A
        reply without thinking is returned unchanged.
        """
        spoken_of = {_name(mark[0]) for message in messages for mark in self.opening.finditer(message["content"])}
        answers = spoken_of - self.sure

        def begins(text: str) -> re.Match | None:
            mark = self.opening.match(text)
            return None if mark is None or _name(mark[0]) in answers else mark

        thoughts, rest = [], reply
        if not begins(reply.lstrip()):
            end = self._end(reply, opened) if opened else self._unopened(reply, answers) if opened is None else None
            if end:
                thoughts, rest = [reply[: end.start()]], reply[end.end() :]
            elif opened:
                return "", reply.strip() or None
        while begin := begins(rest.lstrip()):
            body = rest.lstrip()[begin.end() :]
            end = self._end(body, begin[0])
            if not end and not cut and _name(begin[0]) not in self.sure:  # a heading like [Thought]
                break
            thoughts.append(body[: end.start()] if end else body)
            rest = body[end.end() :] if end else ""
        if not thoughts:
            return reply, None
        # An empty block is what a template with thinking off looks like when the model writes it itself: no thinking.
        return rest.lstrip(), "\n".join(filter(None, map(str.strip, thoughts))) or None

    def _end(self, text: str, opening: str) -> re.Match | None:
        """The first closing mark of an opening one."""
        return next((mark for mark in self.closing.finditer(text) if _name(mark[0]) == _name(opening)), None)

    def _unopened(self, text: str, answers: Set[str]) -> re.Match | None:
        """The first closing mark alone on its line that ends what the text does not show the beginning of."""
        for mark in self.alone.finditer(text):
            name = _name(mark[0])
            if name not in answers and all(_name(o[0]) != name for o in self.opening.finditer(text, 0, mark.start())):
                return mark
        return None

    def opens(self, prompt: str) -> str:
        """The opening mark that a prompt ends with; "" for none."""
        prompt = prompt.rstrip()
        return next((mark[0] for mark in self.opening.finditer(prompt) if mark.end() == len(prompt)), "")

    def uses(self, token: str) -> bool:
        """Whether a token is a mark, or part of one."""
        return token == "<|channel|>" or bool(self.opening.fullmatch(token) or self.closing.fullmatch(token))

    def left(self, text: str, *known: str) -> str | None:
        """A mark in the text that is in none of the known ones, where it would be what they speak of."""
        marks = (mark[0] for pattern in (self.opening, self.closing) for mark in pattern.finditer(text))
        return next((mark for mark in marks if not any(mark in other for other in known)), None)


def _name(mark: str) -> str:
    """What an opening mark and its own closing one have in common: the tag's name, "" for the harmony format."""
    if "<|channel|>" in mark or mark.casefold() in ("analysis", "assistantfinal"):
        return ""
    if mark.endswith("_of_thought|>"):
        return "thought"
    return re.search(r"[^\s<>\[\]/\u25c1\u25b7=]+", mark)[0].casefold()


@lru_cache(maxsize=8)
def thinking_marks(names: tuple[str, ...] = ()) -> ThinkingMarks:
    """Of the usual names (`THINKING`) and these."""
    name = f"(?:{'|'.join(map(re.escape, (*THINKING, *names)))})"
    attributes = r"(?:\s+\w+\s*=[^<>]*)?"
    start = (
        r"<\|channel\|>analysis<\|message\|>"
        r"|\Aanalysis(?=[\s\S]*?assistantfinal)"  # the same, where special tokens are left out
        r"|<\|begin_of_thought\|>"
    )
    final = (
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|assistantfinal|<\|end_of_thought\|>"
    )
    closing = rf"<\s*/\s*{name}\s*>|\[/{name}\]|\u25c1/{name}\u25b7|{final}"
    return ThinkingMarks(
        re.compile(rf"<\s*{name}{attributes}\s*>|\[{name}\]|\u25c1{name}\u25b7|{start}", re.IGNORECASE),
        re.compile(closing, re.IGNORECASE),
        re.compile(rf"^[ \t]*(?:{closing})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE),
        frozenset(("", "think", "seed:think", *(name.casefold() for name in names))),
    )
