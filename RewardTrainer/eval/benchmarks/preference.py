"""Any preference data: a prompt, a chosen and a rejected response a row.

A file, a directory or a dataset of the hub, as for the stages (`distiller/sources.py`); prompt, chosen and rejected as
strings or in TRL's conversational form, with or without a prompt of its own. Honoured where present: `id`, `subset`
(RewardBench's column, accuracy by subset), `margin` (how the reward gap follows it).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distiller.records import InputError, prompt_messages, read_rows, response_text
from RewardTrainer.eval.base import Benchmark, Item, Metric, Scores, read_items
from RewardTrainer.eval.benchmarks.combine import PAIR_VERDICTS, over_rows
from RewardTrainer.eval.metrics import all_pairs_strict, gap_margin_agreement


def load(source: str | Path) -> Benchmark:
    """Raises InputError if the source cannot be read."""
    rows = read_rows(source, required={"prompt": "", "chosen": "", "rejected": ""}, optional=("margin",))
    items, skipped = read_items(rows, make_item)
    by_scores = Metric(all_pairs_strict, over_rows, extra=margins)
    return Benchmark(str(source), str(source), items, skipped, by_scores, PAIR_VERDICTS)


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    return Item(
        id=row["id"],
        subset=_subset(row.get("subset")),
        prompt=prompt_messages(row["prompt"]),
        responses=(response_text(row["chosen"]), response_text(row["rejected"])),
        chosen=(0,),
        where=where,
        margin=_margin(row.get("margin")),
    )


def _subset(value: object) -> str:
    if value is None:
        return "all"
    if not isinstance(value, str):
        raise InputError(f"field `subset` must be a string, not {type(value).__name__}")
    try:
        return response_text(value)
    except InputError as fault:
        raise InputError(f"field `subset` {fault}") from fault


def _margin(value: float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError as fault:  # JSON integers have no limit
        raise InputError("field `margin` is too large for a number") from fault


def margins(items: Sequence[Item], scores: Sequence[Scores]) -> dict[str, float | None]:
    """How the gap follows the margin on the rows that have one; {} where none has."""
    both = [
        (row[0] - row[1], item.margin)
        for item, row in zip(items, scores, strict=True)
        if item.margin is not None and None not in row
    ]
    return gap_margin_agreement([gap for gap, _ in both], [margin for _, margin in both]) if both else {}
