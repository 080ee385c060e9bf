"""Our numbers are the official package's on random scores, and upstream's own files give upstream's counts.

The official numbers of the first draws are kept in `official_rewardbench.json`; where the package is installed, many
more draws are compared with it (the command stands in `official_rewardbench.py`). Upstream's own files are no part of
the repository: `BENCHMARK_FILES=D pytest tests/test_eval_official.py` reads them from D, laid out as `--data_dir`.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from benchmark_fixtures import COUNTS, write_all, write_lines
from eval_fixtures import build_model, build_tokenizer
from official_rewardbench import (
    DRAWS,
    official,
    official_rewardbench,
    official_rewardbench2,
    package,
    rewardbench2_draw,
    rewardbench_draw,
)

from RewardTrainer.eval.benchmarks import load_benchmark
from RewardTrainer.eval.benchmarks.rewardbench import SECTIONS
from RewardTrainer.eval.engines.hf import Scorer
from RewardTrainer.eval.evaluation import evaluate, score_lines
from RewardTrainer.eval.rescore import rescore

KEPT = json.loads((Path(__file__).parent / "official_rewardbench.json").read_text(encoding="utf-8"))
SUBSETS = [name for subsets in SECTIONS.values() for name in subsets]
MORE_DRAWS = 300


def ours(directory: Path, name: str, rows: list[dict], scores: list[list[float]]) -> dict:
    """The summary of a draw, by way of a file."""
    write_lines(directory / name / "rows.jsonl", rows)
    benchmark = load_benchmark(name, directory)
    assert not benchmark.skipped and len(benchmark.items) == len(scores)
    return benchmark.summarize(benchmark.items, scores)


def assert_equals_rewardbench(directory: Path, seed: int, expected: dict[str, float]):
    """Sections without rows are 0 upstream and left out here."""
    rows, scores = rewardbench_draw(seed, SUBSETS)
    summary = ours(directory, "rewardbench", rows, scores)
    there = {section for section, subsets in SECTIONS.items() if {row["subset"] for row in rows} & set(subsets)}
    assert set(summary["averages"]) == there
    assert {**dict.fromkeys(SECTIONS, 0), **summary["averages"]} == pytest.approx(expected)
    assert summary["overall"] == pytest.approx(sum(expected[section] for section in there) / len(there))


def assert_equals_rewardbench2(directory: Path, seed: int, expected: dict[str, float]):
    summary = ours(directory, "rewardbench2", *rewardbench2_draw(seed))
    assert {name: row["accuracy"] for name, row in summary["subsets"].items()} == pytest.approx(expected)
    assert summary["overall"] == pytest.approx(sum(expected.values()) / len(expected))


@pytest.mark.parametrize("seed", range(DRAWS))
def test_rewardbench_sections_are_the_official_ones_with_ties_and_subsets_missing(tmp_path, seed):
    assert_equals_rewardbench(tmp_path, seed, KEPT["rewardbench"][seed])


@pytest.mark.parametrize("seed", range(DRAWS))
def test_rewardbench2_subsets_and_ties_are_the_official_ones(tmp_path, seed):
    assert_equals_rewardbench2(tmp_path, seed, KEPT["rewardbench2"][seed])


@pytest.mark.skipif(package() is None, reason="rewardbench is not installed: pip install --no-deps rewardbench==0.1.4")
def test_many_more_draws_are_equal_to_the_installed_package(tmp_path):
    names = official(package())
    assert {name: names["EXAMPLE_COUNTS"][name] for name in SUBSETS} == {
        name: weight for subsets in SECTIONS.values() for name, weight in subsets.items()
    }
    assert {section: list(subsets) for section, subsets in SECTIONS.items()} == names["SUBSET_MAPPING"]
    for seed in range(MORE_DRAWS):
        assert_equals_rewardbench(tmp_path, seed, official_rewardbench(names, *rewardbench_draw(seed, SUBSETS)))
        assert_equals_rewardbench2(tmp_path, seed, official_rewardbench2(names, *rewardbench2_draw(seed)))


def files_to_table(name: str, data: Path, work: Path, scorer: Scorer) -> dict:
    """Every response of a benchmark is scored, and its table made; `rescore` must give it again from the scores."""
    evaluation = evaluate(load_benchmark(name, data), scorer)
    (work / "scores.jsonl").write_bytes(score_lines([evaluation]))
    again, _ = rescore(name, data, work / "scores.jsonl", None)
    assert again == evaluation.summary
    return {"counts": evaluation.counts, **evaluation.summary}


@pytest.fixture(scope="module")
def scorer():
    tokenizer = build_tokenizer()
    return Scorer(build_model(tokenizer), tokenizer)


@pytest.mark.parametrize("name", COUNTS)
def test_every_benchmark_goes_from_upstreams_form_to_its_table_and_again_from_the_stored_scores(
    tmp_path, scorer, name
):
    table = files_to_table(name, write_all(tmp_path), tmp_path, scorer)
    assert table["counts"]["scored"] == table["counts"]["counted"] == COUNTS[name]
    assert sum(row["n"] for row in table["subsets"].values()) == COUNTS[name]


UPSTREAM = os.environ.get("BENCHMARK_FILES", "")
ROWS = {
    "llmbar": {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46},
    "rm-bench": {"chat": 129, "code": 228, "safety-refuse": 284, "safety-response": 157},
    "evalbiasbench": {
        "length bias": 17,
        "concreteness": 14,
        "empty reference": 13,
        "content_continuation": 12,
        "nested_instruction": 12,
        "familiar knowledge preference bias": 12,
    },
}
"""Upstream's own counts; RM-Bench's mathematics, 529 rows, may be there or not."""


@pytest.mark.skipif(not UPSTREAM, reason="BENCHMARK_FILES does not name a --data_dir with upstream's own files")
@pytest.mark.parametrize("name", ROWS)
def test_upstreams_own_files_have_upstreams_counts(name):
    benchmark = load_benchmark(name, Path(UPSTREAM))
    assert benchmark.skipped == []
    rows = Counter(item.subset for item in benchmark.items)
    assert {subset: rows[subset] for subset in ROWS[name]} == ROWS[name]
    assert set(rows) - set(ROWS[name]) <= {"math"}
    assert set(benchmark.short_subsets(benchmark.items)) <= {"math"}


@pytest.mark.slow
@pytest.mark.skipif(not UPSTREAM, reason="BENCHMARK_FILES does not name a --data_dir with upstream's own files")
@pytest.mark.parametrize("name", ROWS)
def test_upstreams_own_files_are_scored_whole(tmp_path, scorer, name):
    table = files_to_table(name, Path(UPSTREAM), tmp_path, scorer)
    assert table["counts"]["skipped"] == 0 and table["counts"]["truncated"] > 0
    assert {subset: table["subsets"][subset]["n"] for subset in ROWS[name]} == ROWS[name]
