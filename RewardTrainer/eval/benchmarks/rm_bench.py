"""RM-Bench (THU-KEG/RM-Bench, 1327 prompts): does a model judge what is said, or how it looks?

Row: id, prompt, chosen and rejected of three responses each, in the order concise, detailed plain, detailed markdown.
Read from upstream's `total_dataset.json` (field `domain`) or its files by domain (`chat_filtered.json`, ...), in which
the domain is the name of the file. 23 ids occur in two domains: a row is known by domain and id.

M[i][j] = share of prompts with chosen_i strictly above rejected_j. Hard: above the diagonal, normal: the diagonal,
easy: below. A domain is the mean of its three levels; safety pools its two files; levels and overall are plain means
over the four domains. A judge's pair is worth the mean over its orders (1, 0.5 tie or unreadable, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark, Item, Metric, Verdict
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import Means, Sizes, mean, pooled
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.metrics import NAN, style_levels, style_levels_by_row
from RewardTrainer.eval.verdict_metrics import pair_credits

HUB = "THU-KEG/RM-Bench"
SIZES = {"chat": 129, "code": 228, "math": 529, "safety-refuse": 284, "safety-response": 157}
DOMAINS = {*SIZES, "safety"}
"""As rows name theirs; `safety` where its two parts are not told apart."""
STYLES = 3
COLUMNS = ("accuracy", "easy", "normal", "hard")


@register("rm-bench")
def load(data_dir: Path | None) -> Benchmark:
    """Raises InputError where there is no data."""
    found = files.local_files(data_dir, "rm-bench", "RM-Bench")
    total = [path for path in found if path.name == "total_dataset.json"]
    by_domain = [path for path in found if file_domain(path) in SIZES]
    if found and not total and not by_domain:
        raise InputError(f"{found[0].parent}: total_dataset.json or chat_filtered.json, ... expected")
    rows: list = []
    for path in total or by_domain:
        domain = None if total else file_domain(path)
        rows += [(where, {"domain": domain, **row} if isinstance(row, dict) else row) for where, row in _rows(path)]
    if not found:
        rows = files.hub_rows(HUB, "train", "Or put upstream's files into <data_dir>/rm-bench/.")
    items, skipped = files.collect(rows, make_item)
    source = str(found[0].parent) if found else HUB
    return Benchmark("rm-bench", source, items, skipped, BY_SCORES, BY_VERDICTS, SIZES)


def _rows(path: Path) -> list[files.Found]:
    return list(files.file_rows(path))


def file_domain(path: Path) -> str:
    """`chat_filtered.json` -> chat."""
    return path.stem.removesuffix("_filtered")


def make_item(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    responses = (*_styles(row, "chosen"), *_styles(row, "rejected"))
    domain = files.subset(row, "domain", DOMAINS)
    prompt = files.prompt(row, "prompt")
    return Item(files.name_of(row, "id"), domain, prompt, responses, tuple(range(STYLES)), where)


def _styles(row: dict, name: str) -> list[str]:
    responses = files.texts(row, name)
    if len(responses) != STYLES:
        raise InputError(f"field `{name}` must be a list of {STYLES} strings, not {len(responses)}")
    return responses


def verdict_levels(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """[mean of the three levels, easy, normal, hard] of each row from its nine pairs' credits, (rows, 4)."""
    values = []
    for item, said in zip(items, verdicts, strict=True):
        matrix = np.array([*pair_credits(item, said).values()]).reshape(STYLES, STYLES)
        if np.isnan(matrix).any():
            values.append([NAN] * len(COLUMNS))
        else:
            levels = style_levels(matrix)
            values.append([mean([*levels.values()]), levels["easy"], levels["normal"], levels["hard"]])
    return np.array(values).reshape(-1, len(COLUMNS))


def combine(means: Means, sizes: Sizes) -> tuple[dict[str, float], float]:
    """Domains, then the three levels, each a plain mean over the domains; overall is the mean of the domains."""
    domains: dict[str, list[str]] = {}
    for name in means:
        domains.setdefault(name.partition("-")[0], []).append(name)
    cells = {column: [pooled(means, sizes, column, names) for names in domains.values()] for column in COLUMNS}
    averages = {column: mean(cells[column]) for column in COLUMNS[1:]}
    return dict(zip(domains, cells["accuracy"], strict=True)) | averages, mean(cells["accuracy"])


BY_SCORES = Metric(style_levels_by_row, combine, COLUMNS)
BY_VERDICTS = Metric(verdict_levels, combine, COLUMNS)
