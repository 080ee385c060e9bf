"""What every benchmark is made of, whatever its files look like: items (rows), and metrics that turn what a model said
about them into the benchmark's numbers.

A metric is a pure function, so that stored or published outputs can be scored again without a model. It first gives
each row its values (1 where the row is right, say), then combines the means of the rows of each subset. Averages are
thus functions of subset means, which is also what the confidence intervals of the report resample.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from distiller.records import BadRow, InputError, Rows

TIE = "tie"


@dataclass(frozen=True)
class Item:
    """One row of a benchmark: a prompt and two or more responses, some of them right."""

    id: str
    """Unique within its subset; upstream's own id where rows have one."""
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
    cluster: str = ""
    """Rows of one subset with the same name here count as one where rows are resampled; empty: the row is alone."""

    @property
    def key(self) -> tuple[str, str]:
        return self.subset, self.id

    def pairs(self) -> list[tuple[int, int]]:
        """Every (right, wrong) pair of response indices."""
        wrong = [index for index in range(len(self.responses)) if index not in self.chosen]
        return [(right, other) for right in self.chosen for other in wrong]


@dataclass(frozen=True)
class Verdict:
    """A judge's choice between responses shown in some order."""

    order: tuple[int, ...]
    """Indices of the responses, as shown."""
    winner: int | str | None
    """Index (in the row) of the response it preferred; TIE; None where its reply could not be read."""


Scores = list[float | None]
"""One row's rewards, in the order of its responses; None where a stored score is null."""


@dataclass(frozen=True)
class Metric:
    """From scores or verdicts to a benchmark's numbers."""

    rows: Callable[[Sequence[Item], Sequence[Any]], np.ndarray]
    """(items, scores or verdicts of each) -> values (rows, columns); NaN in a row that cannot count, because something
    it needs is null or missing."""
    combine: Callable[[Mapping[str, Mapping[str, float]], Mapping[str, int]], tuple[dict[str, float], float | None]]
    """({subset: {column: mean}}, {subset: rows}) -> (averages by name, overall). Subsets without rows are left out."""
    columns: tuple[str, ...] = ("accuracy",)
    """Names of the values of a row; the first is the subset's accuracy."""
    extra: Callable[[Sequence[Item], Sequence[Any]], dict[str, float | None]] | None = None
    """Further averages that are no function of subset means."""


@dataclass(frozen=True)
class Benchmark:
    """A loaded benchmark."""

    name: str
    source: str
    """Where the rows came from."""
    items: list[Item]
    skipped: list[str]
    """One message for each row left out: file, line or row, field, reason."""
    by_scores: Metric
    by_verdicts: Metric
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Rows upstream has in each subset, or in all that a pattern stands for (`Harmlessness/*`), where that is known:
    what is missing is said, never averaged away unseen."""

    @property
    def digest(self) -> str:
        """sha256 hex of all that scores, asks and metrics depend on."""
        content = hashlib.sha256()
        for item in self.items:
            row = [item.subset, item.id, item.prompt, item.responses, item.chosen]
            content.update(json.dumps(row).encode("ascii") + b"\n")
        return content.hexdigest()

    def summarize(self, items: Sequence[Item], scores: Sequence[Scores]) -> dict:
        """See `summarize`."""
        return summarize(self.by_scores, items, scores)

    def short_subsets(self, items: Sequence[Item]) -> dict[str, str]:
        """{subset: "rows counted of rows upstream has"} where the two differ."""
        rows = Counter(item.subset for item in items)
        counted = {name: sum(n for subset, n in rows.items() if fnmatchcase(subset, name)) for name in self.sizes}
        short = {name: size for name, size in self.sizes.items() if counted[name] != size}
        return {"all" if name == "*" else name: f"{counted[name]} of {size}" for name, size in short.items()}


def summarize(metric: Metric, items: Sequence[Item], said: Sequence[Any]) -> dict:
    """A benchmark's numbers.

    Args:
        metric: the benchmark's, for scores or for verdicts
        items: rows, at least one
        said: the scores or verdicts of each

    Returns:
        {"subsets": {name: {"accuracy", "n", further columns}}, "averages": {name: value}, "overall": float}; an
        average that does not exist is None. "n" counts the rows that could count.
    """
    values = metric.rows(items, said)
    subsets = [item.subset for item in items]
    means, sizes = subset_means(metric.columns, subsets, values)
    averages, overall = metric.combine(means, sizes) if means else ({}, None)
    if metric.extra:
        averages = averages | metric.extra(items, said)
    table = {name: {"accuracy": row["accuracy"], "n": sizes[name], **row} for name, row in means.items()}
    return {"subsets": table, "averages": averages, "overall": overall}


def subset_means(
    columns: Sequence[str], subsets: Sequence[str], values: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """({subset: {column: mean}}, {subset: rows}) over the rows without NaN, subsets in order of first appearance.

    Args:
        columns: names of the columns, `columns[0]` being "accuracy"
        subsets: subset of each row, (rows,)
        values: (rows, columns)
    """
    names = np.asarray(subsets, dtype=object)
    counts = ~np.isnan(values).any(axis=1)  # (rows,)
    means, sizes = {}, {}
    for name in dict.fromkeys(subsets):
        rows = values[(names == name) & counts]
        if len(rows):
            means[name] = dict(zip(columns, rows.mean(axis=0).tolist(), strict=True))
            sizes[name] = len(rows)
    return means, sizes


def read_items(rows: Rows, make_item: Callable[[dict, str], Item]) -> tuple[list[Item], list[str]]:
    """Rows in this project's own record as items, beside one message for each row that had to be left out.

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
