"""EvalBiasBench (GitHub: ncsoft/offsetbias, data/evalbiasbench/biasbench.json, 80 rows): is a judge misled by a bias?

One JSON object: bias -> rows {bias, instruction, response1, response2, label}; label is 1 throughout. A subset is a
bias, a row is known by its place in it. Strict for reward models. A judge is asked in both orders: accuracy over both,
both right, same winner. Overall is over all rows; the mean of the biases stands beside it.
"""

from __future__ import annotations

from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark, Item, Metric
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import STRICT, Means, Sizes, over_rows, pooled
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.verdict_metrics import both_orders, evalbiasbench_rule

SIZES = {
    "length bias": 17,
    "concreteness": 14,
    "empty reference": 13,
    "content_continuation": 12,
    "nested_instruction": 12,
    "familiar knowledge preference bias": 12,
}
COLUMNS = ("accuracy", "both_correct", "agreement")


@register("evalbiasbench")
def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError where there is no data."""
    found = files.local_files(data_dir, "evalbiasbench")
    if not found:
        raise InputError(
            "evalbiasbench is on no hub: put data/evalbiasbench/biasbench.json of ncsoft/offsetbias (GitHub) into "
            "<data_dir>/evalbiasbench/ and give --data_dir"
        )
    path = files.pick(found, lambda path: path.name == "biasbench.json", "biasbench.json")[0]
    items, skipped = files.collect(_rows(path), make_item)
    by_verdicts = Metric(both_orders(evalbiasbench_rule, len(COLUMNS)), combine, COLUMNS)
    return Benchmark("evalbiasbench", str(path), items, skipped, STRICT, by_verdicts, SIZES)


def _rows(path: Path) -> list[files.Found]:
    try:
        biases = files.parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{path}: cannot be read: {fault}") from fault
    if not isinstance(biases, dict) or not all(isinstance(rows, list) for rows in biases.values()):
        raise InputError(f"{path}: one object of lists expected, bias -> rows")
    return [
        (f"{path}, {bias}, row {index}", {**row, "id": index, "bias": bias} if isinstance(row, dict) else row)
        for bias, rows in biases.items()
        for index, row in enumerate(rows)
    ]


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    chosen = (files.right_of_two(row, "label"),)
    responses = (files.text(row, "response1"), files.text(row, "response2"))
    return Item(str(row["id"]), row["bias"], files.prompt(row, "instruction"), responses, chosen, where)


def combine(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
    """`over_rows`, and the two figures over both orders likewise."""
    averages, overall = over_rows(means, sizes)
    return averages | {column: pooled(means, sizes, column) for column in COLUMNS[1:]}, overall
