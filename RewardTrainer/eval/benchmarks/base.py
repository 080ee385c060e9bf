"""What every benchmark is made of, whatever its files look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distiller.records import BadRow, InputError, Rows


@dataclass(frozen=True)
class Item:
    """One row of a benchmark: a prompt and two or more responses, some of them right."""

    id: str
    """Unique within the benchmark."""
    subset: str
    prompt: list[dict[str, str]]
    """Chat messages that end with the user's turn."""
    responses: tuple[str, ...]
    """In the order of the row; `scores.jsonl` counts them from 0."""
    chosen: tuple[int, ...]
    """Indices of the right responses; all others are wrong."""
    where: str
    """File, row and id, for messages."""
    margin: float | None = None
    """By how much the right response is better, where the row says so."""

    def pairs(self) -> list[tuple[int, int]]:
        """Every (right, wrong) pair of response indices."""
        wrong = [index for index in range(len(self.responses)) if index not in self.chosen]
        return [(right, other) for right in self.chosen for other in wrong]


@dataclass(frozen=True)
class Benchmark:
    """A loaded benchmark."""

    name: str
    source: str
    """The file the rows came from."""
    items: list[Item]
    skipped: list[str]
    """One message for each row left out: file, line or row, field, reason."""
    summarize: Callable[[list[Item], list[list[float]]], dict]
    """(items, rewards of each item's responses) -> {"subsets": {name: {"accuracy", "n"}}, "averages": {name: value},
    "overall": float}; an average that does not exist is None. A pure function; it sees only the items that could be
    scored, at least one."""


def read_items(rows: Rows, make_item: Callable[[dict, str], Item]) -> tuple[list[Item], list[str]]:
    """Rows as items, beside one message for each row that had to be left out.

    Left out is what the reader calls bad (no JSON, a field missing or of the wrong type, an empty response, an id that
    came before: scores are kept by id) and what `make_item` refuses. The evaluation goes on without it, and its counts
    say so.

    Args:
        rows: what `read_rows` gave
        make_item: (row, where) -> Item; raises InputError that names the field

    Raises:
        InputError: the file cannot be read, or its rows are all bad in the same way
    """
    items: list[Item] = []
    skipped: list[str] = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, BadRow):
            skipped.append(str(row))
            continue
        where = f"{rows.source}, row {number} (id {row['id']})"
        try:
            items.append(make_item(row, where))
        except InputError as fault:
            skipped.append(f"{where}: {fault}")
    return items, skipped
