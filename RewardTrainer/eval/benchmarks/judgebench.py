"""JudgeBench (ScalerLab/JudgeBench): two responses of one model, one objectively right. Two benchmarks by whose
responses they are: `judgebench-gpt` (350 rows), `judgebench-claude` (270).

Row: pair_id, source, question, response_A, response_B, label (`A>B` or `B>A`). A subset is a category, told by source.
A reward model chooses A where its reward is greater, else B, so that a tie counts for B. A judge is asked in both
orders; see `verdict_metrics.judgebench_rule`. Overall is over all pairs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark, Item, Metric
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import over_rows
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.metrics import first_only_if_greater
from RewardTrainer.eval.verdict_metrics import both_orders, judgebench_rule

HUB = "ScalerLab/JudgeBench"
ROWS = {"gpt": 350, "claude": 270}
CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""Beginning of `source` -> category."""
LABELS = {"A>B": 0, "B>A": 1}


def load(split: str, data_dir: Path | None) -> Benchmark:
    """The rows whose responses are `split`'s ("gpt" or "claude"). Raises InputError where there is no data."""
    name = f"judgebench-{split}"
    found = files.local_files(data_dir, name, "judgebench")
    data = [path for path in found if "judge_name=" not in path.name]  # a clone also holds judges' outputs
    # A lone file may have any name, but not the other split's.
    if len(data) > 1 or any(_is_of(path, other) for path in data for other in ROWS if other != split):
        data = files.pick(data, lambda path: _is_of(path, split), f"a file named after {split}")
    rows = [row for path in data for row in files.file_rows(path)]
    if not found:
        rows = files.hub_rows(HUB, split, f"Or put upstream's file into <data_dir>/{name}/.")
    items, skipped = files.collect(rows, make_item)
    by_scores = Metric(first_only_if_greater, over_rows)
    by_verdicts = Metric(both_orders(judgebench_rule, 1), over_rows)
    return Benchmark(name, str(data[0]) if data else HUB, items, skipped, by_scores, by_verdicts, {"*": ROWS[split]})


def _is_of(path: Path, split: str) -> bool:
    return path.stem.startswith(split) or f"response_model={split}" in path.name


for _split in ROWS:
    register(f"judgebench-{_split}")(partial(load, _split))


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    source, label = files.text(row, "source"), files.text(row, "label")
    categories = [category for start, category in CATEGORIES.items() if source.startswith(start)]
    if not categories:
        raise InputError(f"field `source` {source!r} is of no known category")
    if label not in LABELS:
        raise InputError(f"field `label` must be A>B or B>A, not {label!r}")
    responses = (files.text(row, "response_A"), files.text(row, "response_B"))
    prompt = files.prompt(row, "question")
    return Item(files.name_of(row, "pair_id"), categories[0], prompt, responses, (LABELS[label],), where)
