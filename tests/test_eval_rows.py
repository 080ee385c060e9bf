"""Which rows count, and what a judge's verdicts are worth where a benchmark has no rule of its own."""

import pytest
from benchmark_fixtures import COUNTS, ifbench_row, rewardbench_row, two_orders, write_all, write_json, write_lines

from RewardTrainer.eval.base import TIE, Verdict, summarize
from RewardTrainer.eval.benchmarks import load_benchmark


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "llmbar"])
def test_a_row_with_a_null_score_is_as_good_as_missing(data, name):
    """Where no rule of the benchmark says what a null is worth: it is neither right nor wrong."""
    benchmark = load_benchmark(name, data)
    scores = [
        [float((3 * n + 5 * k) % 7) for k in range(len(item.responses))] for n, item in enumerate(benchmark.items)
    ]
    for lost, item in enumerate(benchmark.items):
        said = [row if n != lost else [*row[:-1], None] for n, row in enumerate(scores)]
        rest = [n for n in range(len(scores)) if n != lost]
        without = benchmark.summarize([benchmark.items[n] for n in rest], [scores[n] for n in rest])
        assert benchmark.summarize(benchmark.items, said) == without, item.where


def test_rewardbench_judge_sections_are_weighted_as_a_reward_models_and_a_tie_is_half(tmp_path):
    rows = [rewardbench_row(n, "math-prm") for n in range(3)] + [rewardbench_row(n, "hep-go") for n in range(2)]
    write_lines(tmp_path / "rewardbench" / "filtered.jsonl", rows)
    benchmark = load_benchmark("rewardbench", tmp_path)
    said = [[Verdict((0, 1), 0)], [Verdict((1, 0), TIE)], [Verdict((0, 1), None)], [Verdict((1, 0), 1)], []]
    summary = summarize(benchmark.by_verdicts, benchmark.items, said)
    assert {name: row["n"] for name, row in summary["subsets"].items()} == {"math-prm": 3, "hep-go": 1}
    # math (1 + 0.5 + 0.5) / 3 x 984, hep-go 0 x 164
    assert summary["overall"] == pytest.approx((2 / 3 * 984) / (984 + 164))


def test_ifbench_judge_is_asked_as_of_any_pair_and_a_row_without_a_verdict_cannot_count(tmp_path):
    write_json(tmp_path / "ifbench" / "data.json", [ifbench_row(n, 1) for n in range(3)])
    benchmark = load_benchmark("ifbench", tmp_path)
    said = [*two_orders((0, TIE), (None, 1)), []]
    table = summarize(benchmark.by_verdicts, benchmark.items, said)["subsets"]
    assert table == {"level-3": {"accuracy": pytest.approx((0.75 + 0.25) / 2), "n": 2}}


def test_a_pairs_verdicts_count_half_for_a_tie_or_an_unreadable_reply(data):
    benchmark = load_benchmark("ifbench", data)
    said = [*two_orders((0, 0), (0, 1), (None, 0)), *([v] for v in two_orders(("tie", 1))[0][:1])]
    summary = summarize(benchmark.by_verdicts, benchmark.items, said + [[]] * 4)
    assert sum(row["n"] for row in summary["subsets"].values()) == 4
    assert summary["overall"] == pytest.approx((1 + 0.5 + 0.75 + 0.5) / 4)


def test_rewardbench2_judge_chooses_among_four_and_says_nothing_of_ties(data):
    benchmark = load_benchmark("rewardbench2", data)
    order = (2, 0, 3, 1)
    of_two = Verdict((0, 1), 0)  # no choice among all four
    of_a_tie = [Verdict((1, 0, 2), 0)]
    said = [[Verdict(order, 0)], [Verdict(order, 2), of_two], [Verdict(order, None)], of_a_tie, []]
    summary = summarize(benchmark.by_verdicts, benchmark.items, said)
    assert summary["subsets"] == {"Factuality": {"accuracy": 1, "n": 1}, "Math": {"accuracy": 0.125, "n": 2}}
