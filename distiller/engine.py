"""The teacher, as the stages see it: conversations in, completions out.

Three engines stand behind this interface (vLLM in process, an OpenAI-compatible server, a pool of vLLM actors on Ray)
and the runner treats them alike: it calls `submit` while fewer than `capacity` asks are in flight, and `collect` to
get what has finished. An engine knows nothing of rows, files, retries of an unparsable reply or resuming; those belong
to the runner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How the teacher draws its tokens; one setting for a whole stage, only the seed changes from ask to ask."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """Nucleus mass in (0, 1]."""
    top_k: int
    """-1 means all tokens."""
    max_tokens: int
    """Longest completion, in tokens (a reasoning teacher's thinking included)."""


@dataclass(frozen=True)
class Choices:
    """What a reply might have said at one place: asks for the probability of each wording, and draws nothing.

    The reply reads `prefill + text + rest`, once with each of the `texts`, which are told apart by their tokens. The
    event that has the probability of a text: the teacher, having said what all the readings begin with, goes on with
    this reading's own tokens, up to and including the first token after them that all the readings share again. So
    "1" is not the beginning of "10" or "1.5", whatever tokens the tokenizer makes of them: the token after it is the
    closing tag's, or holds a part of it. The events exclude each other.

    Each reading is tokenized whole, as the tokenizer would write it. A border inside a token (">1" in one piece) only
    moves the place where the readings part. See `choices.py`.
    """

    prefill: str
    """The reply before the place, as it came, the thinking included (`Completion.prefix`)."""
    texts: tuple[str, ...]
    """At least two, all different."""
    rest: str
    """The reply after the place; it must not begin with what could continue a text (a digit after a number)."""


@dataclass(frozen=True)
class Ask:
    """One question to the teacher."""

    messages: list[dict]
    """`[{"role": "system" | "user" | "assistant", "content": str}, ...]`"""
    seed: int
    """Sampling seed in [0, 2**31). The same ask with the same seed is meant to give the same completion."""
    sampling: Sampling | None = None
    """This ask's own sampling, where two stages share an engine; None for the engine's."""
    choices: Choices | None = None
    """Weigh these wordings of the teacher's answer to `messages` instead of drawing one."""


@dataclass(frozen=True)
class Completion:
    """One answer of the teacher."""

    text: str
    """The answer alone: no `<think>...</think>` block."""
    reasoning: str | None
    """The thinking (`<think>...</think>` split off, or the server's `reasoning_content`); None where there was none.
    Of a reply that max_tokens cut behind a server, and that shows no end of a thinking: all of it, which may be
    one."""
    finish_reason: str
    """`"stop"`, or `"length"` when max_tokens cut the reply."""
    prompt_tokens: int
    completion_tokens: int
    choice_logprobs: tuple[float, ...] | None
    """For an ask with `choices`, whose `text` is empty: the natural logarithm of each one's probability under the
    model as it is (temperature 1, all tokens), in their order; else None."""
    cached_tokens: int | None = None
    """Prompt tokens that came from a prefix cache; None where the engine does not say."""
    prefix: str | None = ""
    """What stood before `text` in the reply as it came: the thinking with its tags, or nothing; None where the server
    has taken it apart, so that nobody can say."""


class AskError(Exception):
    """This ask alone failed (over-long prompt, HTTP 400, ...). The message is the reason, fit for the failed file.

    An answer that is of no use may have been paid for all the same, hence the tokens, which mean what they mean in a
    Completion, and `raw`: what was said in it.
    """

    def __init__(
        self,
        reason: str,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        cached_tokens: int | None = None,
        raw: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.raw = raw
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cached_tokens = cached_tokens


class EngineDead(RuntimeError):
    """No ask can be answered any more (a killed process, a server that refuses or is gone after the client's retries);
    the command must end. The message says what happened and what to check."""


class EngineNotStarted(EngineDead):
    """The engine could not be started in the first place (no such model, too little memory): nothing was asked."""


class TeacherEngine(Protocol):
    """What the runner needs of an engine."""

    capacity: int
    """How many asks the engine wants in flight at once."""

    def submit(self, key: int, ask: Ask) -> None:
        """Queue one ask. A refusal (such as an over-long prompt) is not raised here: `collect` returns it as an
        AskError.

        Raises EngineDead.
        """

    def collect(self) -> list[tuple[int, Completion | AskError]]:
        """Block until at least one submitted ask has finished; return all that have, each with its key. Raises
        EngineDead."""

    # An engine may have `tokens() -> (written, read)`: all tokens since it began, replies under way included; None
    # where it cannot tell.

    def close(self) -> None:
        """Free what the engine holds. Asks still in flight are dropped."""

    def facts(self) -> dict:
        """Versions and settings worth keeping in the manifest (never a secret)."""
