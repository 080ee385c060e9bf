"""Reward models that are no sequence classifier of transformers: two functions of the user's own.

    # my_model.py
    def load(model: str, device: str): ...                # whatever `score` needs
    def score(loaded, conversations: list[list[dict]]) -> list[float]: ...

`eval_rm.sh --adapter my_model.py --model <passed to load>`. A conversation is a list of {"role", "content"} messages
whose last is the response; `score` gets up to `AT_ONCE` of them, those of one row together and rows of similar length
together, and returns a number for each. Chat template, truncation and batching are the adapter's own.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.engines.base import Conversation, Encoded

AT_ONCE = 32


class AdapterScorer:
    """A reward model behind two functions; an `Engine`."""

    max_length = None

    def __init__(self, path: Path, model: str, device: str) -> None:
        """Raises InputError where the file is not there or lacks one of the functions."""
        if not path.is_file():
            raise InputError(f"--adapter {path}: no such file")
        print(f"adapter: the Python code in {path} will run on this machine.", file=sys.stderr)
        sys.path.insert(0, str(path.resolve().parent))  # it may import what lies beside it
        functions = runpy.run_path(str(path))
        for name in ("load", "score"):
            if not callable(functions.get(name)):
                raise InputError(f"--adapter {path}: it must define load(model, device) and score(loaded, ...)")
        self.path = path
        self._score = functions["score"]
        self._loaded = functions["load"](model, device)

    def encode(self, rows: Sequence[Sequence[Conversation]]) -> list[list[Encoded] | InputError]:
        """See `Engine.encode`; sizes are characters, and whether anything is cut is the adapter's own affair."""
        return [[self._as_is(messages) for messages in row] for row in rows]

    @staticmethod
    def _as_is(messages: Conversation) -> Encoded:
        size = sum(len(message["content"]) for message in messages)
        return Encoded(size, messages=tuple(messages), truncated=None, response_cut=None)

    def score(self, rows: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, int, float]]:
        """See `Engine.score`."""
        order = sorted(range(len(rows)), key=lambda row: -max((part.size for part in rows[row]), default=0))
        waiting = [(row, number, part) for row in order for number, part in enumerate(rows[row])]
        for start in range(0, len(waiting), AT_ONCE):
            part = waiting[start : start + AT_ONCE]
            conversations = [[dict(message) for message in encoded.messages] for _, _, encoded in part]
            rewards = [float(reward) for reward in self._score(self._loaded, conversations)]
            if len(rewards) != len(part) or not all(map(math.isfinite, rewards)):
                raise InputError(
                    f"--adapter {self.path}: score must return {len(part)} finite numbers for {len(part)} "
                    f"conversations, and returned {len(rewards)}, {sum(map(math.isfinite, rewards))} of them finite"
                )
            for (row, number, _), reward in zip(part, rewards, strict=True):
                yield row, number, reward
