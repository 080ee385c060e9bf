"""The embedded benchmark, in RM-Bench's sense: the same answer in three styles, so that a model which judges style is
found out.

Row: id, prompt (str or chat messages), chosen and rejected of three responses each, in the order concise, detailed
plain, detailed markdown. Read from `<data_dir>/example/benchmark.jsonl` where that exists, otherwise from the
repository's own file.
"""

from __future__ import annotations

from pathlib import Path

from distiller.records import InputError, prompt_messages, read_rows, response_text
from RewardTrainer.eval.base import Benchmark, Item, Metric, read_items
from RewardTrainer.eval.benchmarks.combine import Means, Sizes
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.benchmarks.rm_bench import COLUMNS as VALUES
from RewardTrainer.eval.benchmarks.rm_bench import STYLES, verdict_levels
from RewardTrainer.eval.metrics import style_levels_by_row

EMBEDDED = Path(__file__).resolve().parents[3] / "examples" / "data" / "benchmark.jsonl"
RENAMED = {"chosen_styles": "chosen", "rejected_styles": "rejected"}
"""Under their own names the reader would take the lists for conversations."""


@register("example")
def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError if the file cannot be read."""
    path = EMBEDDED
    if data_dir is not None and (data_dir / "example").is_dir():
        path = data_dir / "example" / "benchmark.jsonl"
    rows = read_rows(path, RENAMED, required={"prompt": "", "chosen_styles": "", "rejected_styles": ""})
    items, skipped = read_items(rows, make_item)
    by_scores = Metric(style_levels_by_row, combine, VALUES)
    by_verdicts = Metric(verdict_levels, combine, VALUES)
    return Benchmark("example", str(path), items, skipped, by_scores, by_verdicts)


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
        raise InputError(f"field `{RENAMED[name]}` must be a list of {STYLES} strings")
    for index, response in enumerate(responses):
        try:
            response_text(response)
        except InputError as fault:
            raise InputError(f"field `{RENAMED[name]}[{index}]` {fault}") from fault
    return responses


def combine(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
    """Easy, normal, hard and their mean; see `metrics.style_levels`."""
    row = means["example"]
    return {**{level: row[level] for level in VALUES[1:]}, "mean": row["accuracy"]}, row["accuracy"]
