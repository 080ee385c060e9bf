"""RewardBench's own functions beside ours: random draws, and what the official package says of them.

    pip install --no-deps --target DIR rewardbench==0.1.4
    PYTHONPATH=DIR python tests/official_rewardbench.py > tests/official_rewardbench.json

Only the functions that make the numbers are taken from the installed package and run, so that the rest of what it
imports (a GPU's libraries, clients of paid services) need not be there.
"""

import ast
import importlib.util
import json
import math
import random
import sys
from pathlib import Path

from benchmark_fixtures import rewardbench2_row, rewardbench_row

FUNCTIONS = ("calculate_scores_per_section", "reroll_and_score_dataset", "sample_stats", "process_single_model")
PLAIN = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
DRAWS = 12


def package() -> Path | None:
    """Where the official package is installed, if it is. Does not import it."""
    spec = importlib.util.find_spec("rewardbench")
    return Path(spec.origin).parent if spec and spec.origin else None


def official(directory: Path) -> dict:
    """The official functions and constants by name."""
    import numpy as np
    import pandas as pd
    from datasets import Dataset

    names: dict = {"np": np, "pd": pd, "Dataset": Dataset, "math": math}
    tree = ast.parse((directory / "utils.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS]
    exec(compile(ast.Module(functions, []), str(directory / "utils.py"), "exec"), names)
    exec(compile((directory / "constants.py").read_text(encoding="utf-8"), "constants.py", "exec"), names)
    return names


def rewardbench_draw(seed: int, subsets: list[str]) -> tuple[list[dict], list[list[float]]]:
    """Rows of some of the subsets (a third of them missing) and their scores, a third of them tied."""
    draw = random.Random(f"rewardbench {seed}")
    rows = [
        rewardbench_row(n, name) for name in subsets if draw.random() < 2 / 3 for n in range(draw.randint(1, 4))
    ] or [rewardbench_row(0, subsets[0])]
    return rows, [[float(draw.randint(0, 2)), float(draw.randint(0, 2))] for _ in rows]


def rewardbench2_draw(seed: int) -> tuple[list[dict], list[list[float]]]:
    """Rows of some of the subsets and of Ties, and their scores, many of them tied; no tied prompt whose right
    responses all have one score, for there the released package and upstream's newest code differ."""
    draw = random.Random(f"rewardbench2 {seed}")
    subsets = [name for name in PLAIN if draw.random() < 0.8]
    rows = [rewardbench2_row(f"{name} {n}", name) for name in subsets for n in range(draw.randint(1, 4))]
    scores = [[float(draw.randint(0, 2)) for _ in range(4)] for _ in rows]
    for number in range(draw.randint(1, 6)):
        right, wrong, height = draw.randint(2, 5), draw.randint(1, 4), draw.randint(0, 3)
        tied = [height + draw.randint(0, 3) / 2 for _ in range(right)]
        tied[0] = max(tied) + 0.5 if min(tied) == max(tied) else tied[0]
        rows += [
            rewardbench2_row(f"ref:{number}", "Ties", 1, wrong),
            rewardbench2_row(f"tied:{number}", "Ties", right, wrong),
        ]
        scores.append([float(height), *(draw.randint(0, 2) / 2 for _ in range(wrong))])
        scores.append([*tied, *(draw.randint(0, 5) / 2 for _ in range(wrong))])
    return rows, scores


def official_rewardbench(names: dict, rows: list[dict], scores: list[list[float]]) -> dict[str, float]:
    """Section -> score; the sections without rows are 0."""
    results: dict[str, list[int]] = {}
    for row, (chosen, rejected) in zip(rows, scores, strict=True):
        results.setdefault(row["subset"], []).append(int(chosen > rejected))
    accuracies = {subset: sum(values) / len(values) for subset, values in results.items()}
    return names["calculate_scores_per_section"](names["EXAMPLE_COUNTS"], names["SUBSET_MAPPING"], accuracies)


def official_rewardbench2(names: dict, rows: list[dict], scores: list[list[float]]) -> dict[str, float]:
    """Subset -> score."""
    flat = [
        {"text": "", "scores": score, "subset": row["subset"], "row": row["id"]}
        for row, said in zip(rows, scores, strict=True)
        if row["subset"] != "Ties"
        for score in said
    ]
    table: dict[str, float] = {}
    if flat:
        rolled = names["reroll_and_score_dataset"](names["Dataset"].from_list(flat), [4] * (len(flat) // 4))
        for subset in dict.fromkeys(rolled["subset"]):
            values = [row["results"] for row in rolled if row["subset"] == subset]
            table[subset] = sum(values) / len(values)
    ties = [{**row, "scores": said} for row, said in zip(rows, scores, strict=True) if row["subset"] == "Ties"]
    table["Ties"] = float(names["process_single_model"](ties)[1])
    return table


def official_tables(names: dict, draws: int) -> dict[str, list[dict[str, float]]]:
    """What the official functions say of the first draws."""
    subsets = [name for section in names["SUBSET_MAPPING"].values() for name in section]
    return {
        "rewardbench": [official_rewardbench(names, *rewardbench_draw(seed, subsets)) for seed in range(draws)],
        "rewardbench2": [official_rewardbench2(names, *rewardbench2_draw(seed)) for seed in range(draws)],
    }


if __name__ == "__main__":
    where = package()
    if where is None:
        sys.exit("error: rewardbench is not installed; see this file's head")
    json.dump(official_tables(official(where), DRAWS), sys.stdout, indent=1)
    print()
