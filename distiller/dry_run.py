"""What a command would do, without a model: rows, tokens with their uncertainty, and the prompts as the teacher would
see them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

from distiller.engine import Ask
from distiller.records import BadRow, InputError
from distiller.usage import Usage

SAMPLE = 200
"""Rows whose tokens are counted; the rest is estimated from them."""
SHOWN = 2
Preview = Callable[[dict], list[list[dict]]]
"""The conversations a row will need, stand-ins where a reply is not known yet."""


def first_ask(work: Callable[[dict], Iterable[Ask]]) -> Preview:
    """The preview of a stage that offers no other: the first conversation of a row, found by starting its work."""

    def preview(row: dict) -> list[list[dict]]:
        ask = next(iter(work(row)), None)
        return [ask.messages] if ask else []

    return preview


def dry_run(
    rows: Iterable[dict | BadRow],
    preview: Preview,
    count_tokens: Callable[[list[dict]], int],
    max_tokens: int,
    how: str,
    price_per_million: list[float] | None = None,
) -> None:
    """Print the report. `count_tokens` takes a conversation; `how` says in words how it counts. With prices (see
    `usage`) the cost too, nothing cached."""
    good, bad = 0, 0
    sample: list[dict] = []  # uniform over all good rows (reservoir sampling), so that a sorted file does not mislead
    draw = random.Random(0)
    shown = []
    for row in rows:
        if isinstance(row, BadRow):
            bad += 1
            continue
        good += 1
        if len(shown) < SHOWN:
            shown.append(row)
        if len(sample) < SAMPLE:
            sample.append(row)
        elif (place := draw.randrange(good)) < SAMPLE:
            sample[place] = row
    tokens_by_row = [[count_tokens(conversation) for conversation in _conversations(row, preview)] for row in sample]
    asks = total_with_interval([len(tokens) for tokens in tokens_by_row], good)
    prompt_tokens = total_with_interval([sum(tokens) for tokens in tokens_by_row], good)
    for row in shown:
        for number, conversation in enumerate(_conversations(row, preview), 1):
            print(f"--- row {row['id']}, ask {number}")
            for message in conversation:
                print(f"[{message['role']}]\n{message['content']}")
    print("---")
    print(f"rows: {good + bad} ({good} to run, {bad} that cannot be used)")
    print(f"asks: {_said(asks)}, when every reply can be parsed at the first try")
    print(f"prompt tokens: {_said(prompt_tokens)}, from {len(sample)} rows, {how}")
    print(f"completion tokens: at most {asks[0] * max_tokens:,.0f} (max_tokens {max_tokens} each)")
    most = Usage(0, round(prompt_tokens[0]), round(asks[0] * max_tokens), None, price_per_million)
    if most.cost is not None:
        print(f"cost: at most {most.cost:,.4g} at --price_per_million")


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


def _said(estimate: tuple[float, float]) -> str:
    total, half = estimate
    return f"{total:,.0f} +- {half:,.0f} (95 %)" if half else f"{total:,.0f}"
