"""What a command would do, without a model: rows, tokens with their uncertainty, and the prompts as the teacher would
see them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distiller.engine import Ask
from distiller.records import BadRow, InputError
from distiller.usage import Usage

SAMPLE = 10_000
"""Rows whose tokens are counted; the rest is estimated from them. Rendering and counting them takes seconds."""
CHUNK = 500
"""Conversations counted at once; their token ids are held no longer than that."""
SHOWN = 2
BAD_SHOWN = 3


class Weighing(list):
    """The messages of an ask with choices (`engine.Choices`), which puts a reply's wordings in doubt after it came."""

    def __init__(self, messages: list[dict], requests: int) -> None:
        super().__init__(messages)
        self.requests = requests
        """How many the engine makes of it; each reads the messages, and the reply up to the place."""


Preview = Callable[[dict], list[list[dict]]]
"""The conversations a row will need, stand-ins where a reply is not known yet."""
CountTokens = Callable[[list[list[dict]]], list[int | None]]
"""Tokens of each of several conversations; None for one that the chat template refuses."""


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before it: the rows exactly, the rest from a sample.

    A total is (estimate, half width of its 95 % interval); the half width is 0 where every row was counted.
    """

    good: int
    bad: int
    asks: tuple[float, float]
    """When every reply can be parsed at the first try."""
    prompt_tokens: tuple[float, float]
    replies: tuple[float, float]
    """Asks that draw a reply."""
    requests: tuple[float, float]
    """Those behind the other asks. The prompt tokens have their messages, not the replies that they go on from."""
    sampled: int
    refused: int
    """Sampled rows with a conversation that the chat template refuses."""
    shown: list[dict]
    """The first good rows."""
    bad_shown: list[BadRow]


def first_ask(work: Callable[[dict], Iterable[Ask]]) -> Preview:
    """The preview of a stage that offers no other: the first conversation of a row, found by starting its work."""

    def preview(row: dict) -> list[list[dict]]:
        ask = next(iter(work(row)), None)
        return [ask.messages] if ask else []

    return preview


def estimate(
    rows: Iterable[dict | BadRow], preview: Preview, count_tokens: CountTokens, *, seed: int, sample_size: int = SAMPLE
) -> Estimate:
    """Read every row, count the tokens of a uniform sample of the good ones (reservoir sampling, so that the order of
    the file does not matter: its first rows may be its shortest)."""
    good, bad = 0, 0
    sample: list[dict] = []
    draw = random.Random(seed)
    shown, bad_shown = [], []
    for row in rows:
        if isinstance(row, BadRow):
            bad += 1
            if len(bad_shown) < BAD_SHOWN:
                bad_shown.append(row)
            continue
        good += 1
        if len(shown) < SHOWN:
            shown.append(row)
        if len(sample) < sample_size:
            sample.append(row)
        elif (place := draw.randrange(good)) < sample_size:
            sample[place] = row
    asks, tokens, replies, weighed, refused = [], [], [], [], 0
    for start in range(0, len(sample), CHUNK):
        conversations = [_conversations(row, preview) for row in sample[start : start + CHUNK]]
        counts = iter(count_tokens([conversation for several in conversations for conversation in several]))
        for several in conversations:
            counted = [(next(counts), _requests(conversation)) for conversation in several]
            taken = [(count, requests) for count, requests in counted if count is not None]
            asks.append(len(taken))
            replies.append(sum(not requests for _, requests in taken))
            tokens.append(sum(count * (requests or 1) for count, requests in taken))
            weighed.append(sum(requests for _, requests in taken))
            refused += len(taken) < len(counted)
    totals = [total_with_interval(numbers, good) for numbers in (asks, tokens, replies, weighed)]
    return Estimate(good, bad, *totals, len(sample), refused, shown, bad_shown)


def dry_run(
    rows: Iterable[dict | BadRow],
    preview: Preview,
    count_tokens: CountTokens,
    max_tokens: int,
    how: str,
    seed: int,
    price_per_million: list[float] | None = None,
) -> None:
    """Print the report. `how` says in words how tokens are counted. With prices (see `usage`) the cost too, nothing
    cached."""
    found = estimate(rows, preview, count_tokens, seed=seed)
    for row in found.shown:
        asked = [conversation for conversation in _conversations(row, preview) if not _requests(conversation)]
        for number, conversation in enumerate(asked, 1):
            print(f"--- row {row['id']}, ask {number}")
            for message in conversation:
                print(f"[{message['role']}]\n{message['content']}")
    print("---")
    for row in found.bad_shown:
        print(f"bad row: {row}")
    if found.bad > len(found.bad_shown):
        print(f"bad rows: {found.bad - len(found.bad_shown)} more")
    said = f"{found.good} usable, finished ones included; {found.bad} that cannot be used"
    print(f"rows: {found.good + found.bad} ({said})")
    if found.refused:
        print(f"refused by the chat template: {found.refused} of {found.sampled} rows; they will fail")
    print(f"asks: {_said(found.asks)}, when every reply can be parsed at the first try")
    print(f"prompt tokens: {_said(found.prompt_tokens)}, from {found.sampled} rows, {how}")
    most, requests = sum(found.replies) * max_tokens, sum(found.requests)
    print(f"completion tokens: at most {most:,.0f} (max_tokens {max_tokens} each)")
    if requests:
        print(
            f"requests for probabilities: {_said(found.requests)}, their prompts counted above; each also reads a "
            "reply up to the grade and takes one completion token"
        )
    prompts = sum(found.prompt_tokens) + requests * max_tokens
    tokens = Usage(0, round(prompts), round(most + requests), None, price_per_million)
    if tokens.cost is not None:
        print(f"cost: at most {tokens.cost:,.4g} at --price_per_million")


def _requests(conversation: list[dict]) -> int:
    return conversation.requests if isinstance(conversation, Weighing) else 0


def _conversations(row: dict, preview: Preview) -> list[list[dict]]:
    """None where the row's content is refused, as it will be when the stage runs."""
    try:
        return preview(row)
    except InputError:
        return []


def total_with_interval(sample: list[int], population: int) -> tuple[float, float]:
    """(estimated sum over the population, half width of its 95 % interval) from a uniform sample without replacement.

    Normal approximation with the finite population correction: a sample of everything has no uncertainty.
    """
    size = len(sample)
    if not size:
        return 0.0, 0.0
    mean = sum(sample) / size
    if size == population or size == 1:
        return mean * population, 0.0
    variance = sum((value - mean) ** 2 for value in sample) / (size - 1)
    correction = (population - size) / (population - 1)
    return mean * population, 1.96 * population * math.sqrt(variance / size * correction)


def _said(total: tuple[float, float]) -> str:
    value, half = total
    return f"{value:,.0f} +- {half:,.0f} (95 % interval)" if half else f"{value:,.0f}"
