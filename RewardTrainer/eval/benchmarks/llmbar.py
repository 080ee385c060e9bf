"""LLMBar (princeton-nlp/LLMBar, 419 rows): which output follows the instruction?

Row: input, output_1, output_2, label (1 or 2); no id, so a row is known by its place in its subset. Subsets: Natural
and the four adversarial ones. Averages: the adversarial sets, and over both orders how often the evaluator is right in
both and names the same winner. Overall is the plain mean of the five subsets.

A reward model is a rating evaluator: on two equal rewards the winner depends on the order, so that a tie is right in
exactly one of the two (0.5).
"""

from __future__ import annotations

from pathlib import Path

from RewardTrainer.eval.base import Benchmark, Item, Metric
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import Means, Sizes, mean
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.metrics import rated_in_both_orders
from RewardTrainer.eval.verdict_metrics import both_orders, llmbar_rule

HUB = "princeton-nlp/LLMBar"
SIZES = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
COLUMNS = ("accuracy", "both_correct", "agreement")
REMEDY = "Or put upstream's Dataset/LLMBar/ (Natural/dataset.json, ...) into <data_dir>/llmbar/."


@register("llmbar")
def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError where there is no data."""
    found = files.local_files(data_dir, "llmbar", "LLMBar")
    data = files.pick(found, lambda path: path.parent.name in SIZES, "Natural/dataset.json, ...")
    rows: list = []
    for path in data:
        rows += _numbered(files.file_rows(path), path.parent.name)
    for subset in () if found else SIZES:
        split = subset if subset == "Natural" else f"Adversarial_{subset}"
        # The dataset itself is a loading script, which `datasets` no longer runs; this is the hub's own conversion.
        hub = files.hub_rows(HUB, split, REMEDY, name="LLMBar", revision="refs/convert/parquet")
        rows += _numbered(hub, subset)
    items, skipped = files.collect(rows, make_item)
    source = str(found[0].parent) if found else HUB
    by_scores = Metric(rated_in_both_orders, combine, COLUMNS)
    by_verdicts = Metric(both_orders(llmbar_rule, len(COLUMNS)), combine, COLUMNS)
    return Benchmark("llmbar", source, items, skipped, by_scores, by_verdicts, SIZES)


def _numbered(rows, subset: str) -> list[files.Found]:
    return [
        (where, {**row, "id": index, "subset": subset} if isinstance(row, dict) else row)
        for index, (where, row) in enumerate(rows)
    ]


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    chosen = (files.right_of_two(row, "label"),)
    responses = (files.text(row, "output_1"), files.text(row, "output_2"))
    return Item(str(row["id"]), row["subset"], files.prompt(row, "input"), responses, chosen, where)


def combine(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
    """The mean of the adversarial subsets, the two figures over both orders, and the mean of all subsets."""
    adversarial = [row["accuracy"] for name, row in means.items() if name != "Natural"]
    averages = {"adversarial": mean(adversarial)} if adversarial else {}
    averages |= {column: mean([row[column] for row in means.values()]) for column in COLUMNS[1:]}
    return averages, mean([row["accuracy"] for row in means.values()])
