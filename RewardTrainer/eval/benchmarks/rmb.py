"""RMB (GitHub: Zhou-Zoey/RMB-Reward-Model-Benchmark, folder RMB_dataset). Two benchmarks: `rmb-pairwise` (17131 pairs)
and `rmb-bon` (3786 rows of one best response and its losers).

Pairwise row: pair_uid, conversation_input (messages), chosen {answer}, reject {answer}, category_path. Best-of-N row:
bon_uid, conversation_input, bon_best {answer}, loser_list [{answer}, ...], category_path; right where the best is
strictly above every loser. A subset is a category path. Averages: harmlessness and helpfulness, each over its rows;
overall is their mean, so that RMB's own overall (mean of four cells) is the mean of the two benchmarks' overalls.

A few pairs have identical answers and cannot be won; they count, as upstream counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from distiller.records import InputError
from RewardTrainer.eval.base import Benchmark, Item, Metric
from RewardTrainer.eval.benchmarks import files
from RewardTrainer.eval.benchmarks.combine import grouped
from RewardTrainer.eval.benchmarks.registry import register
from RewardTrainer.eval.metrics import all_pairs_strict
from RewardTrainer.eval.verdict_metrics import all_pairs_won

FOLDERS = {"rmb-pairwise": "Pairwise_set", "rmb-bon": "BoN_set"}
CELLS = ("Harmlessness", "Helpfulness")
SIZES = {
    "rmb-pairwise": {"Harmlessness/*": 7064, "Helpfulness/*": 10067},
    "rmb-bon": {"Harmlessness/*": 1677, "Helpfulness/*": 2109},
}


def load(name: str, data_dir: Path | None) -> Benchmark:
    """One of the two benchmarks. Raises InputError where there is no data."""
    folder = FOLDERS[name]
    found = files.local_files(data_dir, name, "rmb")
    if not found:
        raise InputError(
            f"{name} is on no hub: clone Zhou-Zoey/RMB-Reward-Model-Benchmark from GitHub into <data_dir>/{name}/ "
            "(or <data_dir>/rmb/, for both of its benchmarks) and give --data_dir"
        )
    data = files.pick(found, lambda path: folder in path.parts, f"a folder {folder}")
    items, skipped = files.collect((row for path in data for row in files.file_rows(path)), MAKERS[name])
    combine = grouped(lambda subset: subset.partition("/")[0].lower())
    by_scores, by_verdicts = Metric(all_pairs_strict, combine), Metric(all_pairs_won, combine)
    return Benchmark(name, str(data[0].parent), items, skipped, by_scores, by_verdicts, SIZES[name])


for _name in FOLDERS:
    register(_name)(partial(load, _name))


def make_pair(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    responses = (files.text(row, "chosen", "answer"), files.text(row, "reject", "answer"))
    return _item(row, "pair_uid", responses, where)


def make_best_of_n(row: dict, where: str) -> Item:
    """Raises InputError naming the field."""
    losers = row.get("loser_list")
    if not isinstance(losers, list) or not losers or not all(isinstance(loser, dict) for loser in losers):
        raise InputError("field `loser_list` must be a list of objects")
    responses = (files.text(row, "bon_best", "answer"), *(files.text(loser, "answer") for loser in losers))
    return _item(row, "bon_uid", responses, where)


def _item(row: dict, identifier: str, responses: tuple[str, ...], where: str) -> Item:
    path = files.text(row, "category_path").partition("/")[2]  # without Pairwise_set/ or BoN_set/
    if path.partition("/")[0] not in CELLS:
        raise InputError(f"field `category_path` must name {' or '.join(CELLS)}, not {row['category_path']!r}")
    prompt = files.prompt(row, "conversation_input")
    return Item(files.name_of(row, identifier), path, prompt, responses, (0,), where)


MAKERS: dict[str, Callable[[dict, str], Item]] = {"rmb-pairwise": make_pair, "rmb-bon": make_best_of_n}
