"""The embedded benchmark, in RM-Bench's sense: the same answer in three styles, so that a model which judges style is
found out.

Row: id, prompt (str or chat messages), chosen and rejected of three responses each, in the order concise, detailed
plain, detailed markdown. Read from `<data_dir>/example/benchmark.jsonl` where that exists, otherwise from the
repository's own file.
"""

from __future__ import annotations

from pathlib import Path

from distiller.records import InputError, prompt_messages, read_rows, response_text
from RewardTrainer.eval.benchmarks.base import Benchmark, Item, read_items
from RewardTrainer.eval.metrics import style_levels, style_matrix

EMBEDDED = Path(__file__).resolve().parents[3] / "examples" / "data" / "benchmark.jsonl"
STYLES = 3
COLUMNS = {"chosen_styles": "chosen", "rejected_styles": "rejected"}
"""Under their own names the reader would take the lists for conversations."""


def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError if the file cannot be read."""
    path = EMBEDDED
    if data_dir is not None and (data_dir / "example").is_dir():
        path = data_dir / "example" / "benchmark.jsonl"
    rows = read_rows(path, COLUMNS, required={"prompt": "", "chosen_styles": "", "rejected_styles": ""})
    items, skipped = read_items(rows, make_item)
    return Benchmark("example", str(path), items, skipped, summarize)


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    return Item(
        id=row["id"],
        subset="example",
        prompt=prompt_messages(row["prompt"]),
        responses=(*_styles(row, "chosen_styles"), *_styles(row, "rejected_styles")),
        chosen=tuple(range(STYLES)),
        where=where,
    )


def _styles(row: dict, name: str) -> list[str]:
    responses = row[name]
    if not isinstance(responses, list) or len(responses) != STYLES or not all(isinstance(r, str) for r in responses):
        raise InputError(f"field `{COLUMNS[name]}` must be a list of {STYLES} strings")
    for index, response in enumerate(responses):
        try:
            response_text(response)
        except InputError as fault:
            raise InputError(f"field `{COLUMNS[name]}[{index}]` {fault}") from fault
    return responses


def summarize(items: list[Item], scores: list[list[float]]) -> dict:
    """Easy, normal, hard and their mean; see `metrics.style_levels`."""
    levels = style_levels(style_matrix([row[:STYLES] for row in scores], [row[STYLES:] for row in scores]))
    mean = sum(levels.values()) / len(levels)
    subsets = {"example": {"accuracy": mean, "n": len(items)}}
    return {"subsets": subsets, "averages": {**levels, "mean": mean}, "overall": mean}
