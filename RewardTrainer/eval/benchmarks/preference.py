"""Any preference file: a prompt, a chosen and a rejected response a row.

JSONL or a JSON array; prompt, chosen and rejected as strings or in TRL's conversational form, with or without a prompt
of its own. Honoured where present: `id`, `subset` (RewardBench's column, accuracy by subset), `margin` (how the reward
gap follows it).
"""

from __future__ import annotations

from pathlib import Path

from distiller.records import InputError, prompt_messages, read_rows, response_text
from RewardTrainer.eval.benchmarks.base import Benchmark, Item, read_items
from RewardTrainer.eval.metrics import gap_margin_agreement, strict_accuracy


def load(path: Path) -> Benchmark:
    """Raises InputError if the file cannot be read."""
    rows = read_rows(path, required={"prompt": "", "chosen": "", "rejected": ""}, optional=("margin",))
    items, skipped = read_items(rows, make_item)
    return Benchmark(str(path), str(path), items, skipped, summarize)


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


def summarize(items: list[Item], scores: list[list[float]]) -> dict:
    """Strict accuracy by subset; overall is the mean over all pairs, whatever their subset.

    With margins (on all rows or some), also how the gap follows them on the rows that have one.
    """
    by_subset: dict[str, list[list[float]]] = {}
    for item, row in zip(items, scores, strict=True):
        by_subset.setdefault(item.subset, []).append(row)
    subsets = {name: {"accuracy": _accuracy(rows), "n": len(rows)} for name, rows in by_subset.items()}
    averages: dict[str, float | None] = {}
    if len(subsets) > 1:
        averages["mean_of_subsets"] = sum(subset["accuracy"] for subset in subsets.values()) / len(subsets)
    with_margin = [
        (row[0] - row[1], item.margin) for item, row in zip(items, scores, strict=True) if item.margin is not None
    ]
    if with_margin:
        averages |= gap_margin_agreement([gap for gap, _ in with_margin], [margin for _, margin in with_margin])
    return {"subsets": subsets, "averages": averages, "overall": _accuracy(scores)}


def _accuracy(rows: list[list[float]]) -> float:
    return strict_accuracy([row[0] for row in rows], [row[1] for row in rows])
