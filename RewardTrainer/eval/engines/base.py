"""What an engine is to the rest: rows of conversations in, one reward for each conversation out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from distiller.records import InputError

Conversation = list[dict[str, str]]
"""Chat messages that end with the response to be rewarded."""


@dataclass(frozen=True)
class Encoded:
    """One conversation, ready for an engine."""

    size: int
    """Tokens (characters where the engine keeps its tokens to itself)."""
    ids: tuple[int, ...] = ()
    """Token ids, no padding; empty where the engine takes messages."""
    messages: tuple[dict[str, str], ...] = ()
    """The messages, where the engine takes those."""
    truncated: bool | None = False
    """The left end was cut off to fit `max_length`; None where the engine does not say."""
    response_cut: bool | None = False
    """The response alone is longer than `max_length`, so the cut also took its beginning."""


class Engine(Protocol):
    """A reward model, however it is run."""

    max_length: int | None
    """Longest conversation in tokens; None where the engine does not say."""

    def encode(self, rows: Sequence[Sequence[Conversation]]) -> list[list[Encoded] | InputError]:
        """Each row's conversations, which share a prompt; an InputError for a row that the model's chat template
        refuses."""

    def score(self, rows: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, int, float]]:
        """(row, conversation in it, reward), each once, in any order, as they come.

        Raises:
            InputError: rewards that cannot be used (not finite, ...)
        """


def score_each_once(
    engine: Engine, rows: Sequence[Sequence[Encoded]], known: dict[bytes, float] | None = None
) -> Iterator[tuple[int, int, float]]:
    """`Engine.score`, with equal conversations of all rows run once, so that they get one reward.

    Rounding depends on where a conversation stands in a batch, and rewards 1e-6 apart would decide what is a tie.
    `known` keeps the rewards, by a hash of their conversation, from one call to the next.
    """
    known = {} if known is None else known
    distinct: list[list[Encoded]] = []
    keys: list[list[bytes]] = []  # of `distinct`
    places: dict[bytes, list[tuple[int, int]]] = {}
    for row, conversations in enumerate(rows):
        distinct.append([])
        keys.append([])
        for number, conversation in enumerate(conversations):
            text = json.dumps(conversation.ids or conversation.messages)
            key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if key in known:
                yield row, number, known[key]
                continue
            if key not in places:
                distinct[-1].append(conversation)
                keys[-1].append(key)
            places.setdefault(key, []).append((row, number))
    for row, number, reward in engine.score(distinct):
        known[keys[row][number]] = reward
        yield from ((*place, reward) for place in places[keys[row][number]])
