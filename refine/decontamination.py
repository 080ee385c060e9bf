"""Decontamination: does a training prompt share a run of n words with the prompt of a benchmark?

Pure functions and plain state, no I/O.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from distiller.fields import kind_of, prompt_messages
from distiller.sources import InputError
from refine.conversation import UNSPACED

_PLAIN_WORD = re.compile(f"(?=[^\\W_])[{UNSPACED}]|[^\\W_{UNSPACED}]+")
PROMPT_FIELDS = "prompt instruction original_instruction input question conversation_input messages".split()
"""Where the public benchmarks keep their prompts."""


def plain_words(text: str) -> list[str]:
    """The words of a text without what typing varies: case, punctuation, markup, white space, compatibility forms of
    characters. In scripts that write no space between words each character is a word."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _PLAIN_WORD.findall(text.casefold())


def turns_of(messages: Sequence[dict]) -> list[str]:
    """What is said in a conversation up to its last user message, a text a turn; instructions of the system, which
    many prompts share, are left out."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return [message["content"] for message in messages[: last + 1] if message["role"] != "system"]


class Benchmarks:
    """Word n-grams of benchmark prompts (`plain_words`), none across two turns. A prompt whose turns all have fewer
    than n words has no n-gram: it is met by the same prompt alone. About 200 bytes an n-gram."""

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.prompts = 0
        self.places: dict[str, str] = {}
        """n-gram, or whole short prompt: where it stands first."""

    def add(self, turns: Iterable[str], place: str) -> None:
        self.prompts += 1
        for gram in self._grams([plain_words(turn) for turn in turns]):
            self.places.setdefault(gram, place)

    def overlap(self, turns: list[list[str]]) -> dict | None:
        """The first n-gram that turns (lists of `plain_words`) have in common with a benchmark, `{"ngram",
        "benchmark"}`; None for none."""
        grams = (gram for gram in self._grams(turns) if gram in self.places)
        return next(({"ngram": gram, "benchmark": self.places[gram]} for gram in grams), None)

    def _grams(self, turns: list[list[str]]) -> Iterable[str]:
        size = self.ngram
        if any(turns) and all(len(words) < size for words in turns):
            return ["\n".join(" ".join(words) for words in turns)]
        return (" ".join(words[i : i + size]) for words in turns for i in range(len(words) - size + 1))


def benchmark_prompts(value: object) -> list[list[str]]:
    """The prompts (each a list of turns) in one row of a benchmark: a text, a list of messages, or an object with
    either in any of PROMPT_FIELDS; with none of them, whole conversations in `chosen`. Raises InputError."""
    if isinstance(value, str | list):
        return [_turns(value)]
    if not isinstance(value, dict):
        raise InputError(f"must be an object, a text or a list of messages, not {kind_of(value)}")
    found = [value[name] for name in PROMPT_FIELDS if isinstance(value.get(name), str | list) and value[name]]
    if not found and isinstance(value.get("chosen"), list):
        found = [value["chosen"]]
    if not found:
        raise InputError(
            f"has no prompt in any of the fields {', '.join(PROMPT_FIELDS)}; it has {', '.join(map(str, value))}"
        )
    return [_turns(prompt) for prompt in found]


def _turns(prompt: object) -> list[str]:
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
    return turns_of(prompt_messages(prompt))
