"""IFBench, reward-model form (THU-KEG/IFBench, 444 rows): does a response keep the constraints of its instruction?

Row: id, instruction, chosen and rejected {content, unsatisfied_constraints}. A subset is a level: the fewer of the
constraints the rejected response breaks, the harder to see (1: level-3, 2: level-2, more: level-1). Strict.
"""

from __future__ import annotations

from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark, Item
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import PAIR_VERDICTS, STRICT
from RewardTrainer.eval.benchmarks.registry import register

HUB = "THU-KEG/IFBench"
SIZES = {"level-3": 264, "level-2": 133, "level-1": 47}


@register("ifbench")
def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError where there is no data."""
    found = files.local_files(data_dir, "ifbench")
    rows = [row for path in found for row in files.file_rows(path)]
    if not found:
        rows = files.hub_rows(HUB, "train", "Or put upstream's file into <data_dir>/ifbench/.")
    items, skipped = files.collect(rows, make_item)
    return Benchmark("ifbench", str(found[0].parent) if found else HUB, items, skipped, STRICT, PAIR_VERDICTS, SIZES)


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    responses = (files.text(row, "chosen", "content"), files.text(row, "rejected", "content"))
    broken = row["rejected"].get("unsatisfied_constraints")
    if not isinstance(broken, list):
        raise InputError("field `rejected.unsatisfied_constraints` must be a list")
    level = {1: "level-3", 2: "level-2"}.get(len(broken), "level-1")
    return Item(files.name_of(row, "id"), level, files.prompt(row, "instruction"), responses, (0,), where)
