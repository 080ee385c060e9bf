"""Public benchmarks: upstream's files become the right items, their numbers those of tables worked out by hand."""

import math
import sys

import datasets
import pytest
from benchmark_fixtures import (
    COUNTS,
    evalbias_row,
    ifbench_row,
    judgebench_row,
    llmbar_row,
    rewardbench2_row,
    rewardbench_row,
    rm_bench_row,
    rmb_bon_row,
    rmb_row,
    two_orders,
    write_all,
    write_json,
    write_lines,
)

from distiller.records import InputError
from RewardTrainer.eval.base import TIE, Verdict, summarize
from RewardTrainer.eval.benchmarks import BENCHMARKS, load_benchmark
from RewardTrainer.eval.benchmarks.rewardbench import SECTIONS
from RewardTrainer.eval.metrics import ties_credit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("name", COUNTS)
def test_every_benchmark_is_read_from_upstreams_files_whole(data, name):
    benchmark = load_benchmark(name, data)
    assert benchmark.skipped == []
    assert len(benchmark.items) == COUNTS[name]
    assert len({item.key for item in benchmark.items}) == COUNTS[name]
    for item in benchmark.items:
        assert item.prompt[-1]["role"] == "user" and set(item.prompt[-1]) == {"role", "content"}
        assert item.pairs()


def test_the_names_of_the_contract_are_all_there():
    assert set(BENCHMARKS) == {"example", *COUNTS}


@pytest.mark.parametrize("name", COUNTS)
def test_a_perfect_model_has_everything_and_a_constant_one_what_the_tie_rule_gives(data, name):
    benchmark = load_benchmark(name, data)
    perfect = [[float(i in item.chosen) for i in range(len(item.responses))] for item in benchmark.items]
    summary = benchmark.summarize(benchmark.items, perfect)
    best = 1.01 if name == "rewardbench2" else 1.0  # Ties has a further hundredth
    assert all(row["accuracy"] == pytest.approx(best if s == "Ties" else 1) for s, row in summary["subsets"].items())
    constant = benchmark.summarize(benchmark.items, [[0.5] * len(item.responses) for item in benchmark.items])
    expected = {"llmbar": 0.5, "rewardbench2": (0.25 + 0.25 + 0) / 3, "judgebench-gpt": 0.5, "judgebench-claude": 0.5}
    assert constant["overall"] == pytest.approx(expected.get(name, 0))


def test_a_benchmark_without_its_folder_is_fetched_from_the_hub_by_its_usual_name(data, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, split, **options):
        asked.append((path, split, *options.values()))
        raise datasets.exceptions.DatasetNotFoundError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = [name for name in COUNTS if name not in ("evalbiasbench", "rmb-pairwise", "rmb-bon")]
    for name in hub:
        with pytest.raises(InputError, match=r"hub: no network here\nOr put .* into <data_dir>/"):
            load_benchmark(name, tmp_path)
    assert asked == [
        ("allenai/reward-bench", "filtered"),
        ("allenai/reward-bench-2", "test"),
        ("THU-KEG/RM-Bench", "train"),
        ("ScalerLab/JudgeBench", "gpt"),
        ("ScalerLab/JudgeBench", "claude"),
        ("princeton-nlp/LLMBar", "Natural", "LLMBar", "refs/convert/parquet"),
        ("THU-KEG/IFBench", "train"),
    ]
    for name in ("evalbiasbench", "rmb-pairwise", "rmb-bon"):
        with pytest.raises(InputError, match="on no hub.*--data_dir"):
            load_benchmark(name, None)
    rows = [rewardbench_row(n, "hep-go") for n in range(3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list(rows))
    assert [item.id for item in load_benchmark("rewardbench", None).items] == ["0", "1", "2"]


def test_a_folder_with_other_files_says_what_was_expected(tmp_path):
    write_json(tmp_path / "rm-bench" / "notes.json", [])
    with pytest.raises(InputError, match="chat_filtered.json, ... expected"):
        load_benchmark("rm-bench", tmp_path)
    (tmp_path / "llmbar").mkdir()
    with pytest.raises(InputError, match="no .json, .jsonl, .parquet file in it"):
        load_benchmark("llmbar", tmp_path)


def test_rows_that_upstream_has_and_a_file_lacks_are_said_for_groups_of_subsets_too(data):
    expected = {
        "judgebench-gpt": {"all": "4 of 350"},
        "judgebench-claude": {"all": "2 of 270"},
        "rmb-pairwise": {"Harmlessness/*": "3 of 7064", "Helpfulness/*": "1 of 10067"},
        "rmb-bon": {"Harmlessness/*": "1 of 1677", "Helpfulness/*": "1 of 2109"},
        "ifbench": {"level-3": "2 of 264", "level-2": "2 of 133", "level-1": "4 of 47"},
    }
    for name, short in expected.items():
        benchmark = load_benchmark(name, data)
        assert benchmark.short_subsets(benchmark.items) == short


def test_a_new_benchmark_is_one_file(tmp_path, monkeypatch):
    """A module dropped into the package is known by its name, with no other change."""
    import RewardTrainer.eval.benchmarks as package

    (tmp_path / "mine.py").write_text(
        "from RewardTrainer.eval.base import Benchmark, Item\n"
        "from RewardTrainer.eval.benchmarks.combine import PAIR_VERDICTS, STRICT\n"
        "from RewardTrainer.eval.benchmarks.registry import register\n"
        "@register('mine')\n"
        "def load(data_dir):\n"
        "    items = [Item('1', 's', [{'role': 'user', 'content': 'q'}], ('a', 'b'), (0,), 'here')]\n"
        "    return Benchmark('mine', 'here', items, [], STRICT, PAIR_VERDICTS)\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(package.registry, "BENCHMARKS", package.BENCHMARKS)
    source = package.__loader__.get_source(package.__name__)
    exec(compile(source, package.__file__, "exec"), package.__dict__)  # what a fresh import does
    try:
        benchmark = load_benchmark("mine", None)
        assert benchmark.summarize(benchmark.items, [[1, 0]])["overall"] == 1
    finally:
        del BENCHMARKS["mine"], sys.modules["RewardTrainer.eval.benchmarks.mine"]


# RewardBench


def test_rewardbench_sections_weigh_math_like_all_of_the_code(tmp_path):
    rows = [rewardbench_row(n, "math-prm") for n in range(2)] + [rewardbench_row(n, "hep-cpp") for n in range(4)]
    rows += [rewardbench_row(0, "hep-go"), rewardbench_row(0, "alpacaeval-easy"), rewardbench_row(0, "mt-bench-easy")]
    write_lines(tmp_path / "rewardbench" / "filtered.jsonl", rows)
    benchmark = load_benchmark("rewardbench", tmp_path)
    scores = [[1, 0], [1, 1], [1, 0], [0, 0], [0, 1], [0, 1], [2, 1], [3, 1], [1, 3]]
    summary = benchmark.summarize(benchmark.items, scores)
    assert summary["subsets"]["math-prm"] == {"accuracy": 0.5, "n": 2}
    assert summary["subsets"]["hep-cpp"] == {"accuracy": 0.25, "n": 4}
    # math 0.5 x 984, hep-cpp 0.25 x 164, hep-go 1 x 164; easy 1 x 100, mt-bench-easy 0 x 28
    reasoning, chat = (0.5 * 984 + 0.25 * 164 + 164) / (984 + 164 + 164), 100 / 128
    assert summary["averages"] == pytest.approx({"Reasoning": reasoning, "Chat": chat})
    assert summary["overall"] == pytest.approx((reasoning + chat) / 2)
    assert benchmark.short_subsets(benchmark.items)["math-prm"] == "2 of 447"


def test_rewardbench_with_all_subsets_is_the_mean_of_math_and_of_the_six_languages(tmp_path):
    names = [name for section in SECTIONS.values() for name in section]
    write_lines(tmp_path / "rewardbench" / "f.jsonl", [rewardbench_row(0, name) for name in names])
    benchmark = load_benchmark("rewardbench", tmp_path)
    scores = [[1, 0] if item.subset in ("math-prm", "hep-js") else [0, 1] for item in benchmark.items]
    averages = benchmark.summarize(benchmark.items, scores)["averages"]
    assert averages["Reasoning"] == pytest.approx((1 + 1 / 6) / 2)
    assert set(averages) == {"Chat", "Chat Hard", "Safety", "Reasoning"}


# RewardBench 2


def test_rewardbench2_gives_a_share_of_a_tie_at_the_top_and_nothing_below_it(tmp_path):
    write_lines(tmp_path / "rewardbench2" / "t.jsonl", [rewardbench2_row(str(n), "Math") for n in range(5)])
    benchmark = load_benchmark("rewardbench2", tmp_path)
    scores = [[2, 1, 0, 0], [2, 2, 0, 2], [1, 2, 0, 0], [5, 5, 5, 5], [2, 2 - 1e-9, 0, 0]]
    summary = benchmark.summarize(benchmark.items, scores)
    assert summary["subsets"]["Math"]["accuracy"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 4 + 1) / 5)


def test_ties_terms_by_hand():
    # ref: 3 against 1: margin 2.  tied: 5, 4 against 3: margin 1, spread 1.  smaller margin 1, 1 > 1 is false
    terms = ties_credit([3, 1], 1, [5, 4, 3], 2)
    assert terms == pytest.approx((1, 1, 0, 0, math.tanh(0)))
    # tied: 5, 4 against 1: margin 3 > spread 1; ref margin 2: smaller 2 > 1, tanh(2 - 1)
    assert ties_credit([3, 1], 1, [5, 4, 1], 2) == pytest.approx((1, 1, 1, 1, math.tanh(1)))
    # ref wrong: margin -1, smaller -1
    assert ties_credit([0, 1], 1, [5, 4, 1], 2) == pytest.approx((1, 0, 1, 0, math.tanh(-2)))


@pytest.mark.parametrize(
    ("ref", "tied", "term"), [([2, 1], [4, 4, 1], 1), ([0, 1], [4, 4, 1], -1), ([2, 2], [4, 4, 1], 0)]
)
def test_ties_with_no_spread_take_the_limit_and_zero_over_zero_is_zero(ref, tied, term):
    assert ties_credit(ref, 1, tied, 2)[-1] == term


def test_rewardbench2_ties_are_weighted_over_prompts_and_a_prompt_without_its_reference_cannot_count(tmp_path):
    rows = [rewardbench2_row("ref:1", "Ties", 1, 1), rewardbench2_row("tied:1", "Ties", 2, 1)]
    rows += [rewardbench2_row("ref:2", "Ties", 1, 1), rewardbench2_row("tied:2", "Ties", 2, 1)]
    rows += [rewardbench2_row("tied:3", "Ties", 2, 1), rewardbench2_row("9", "Math")]
    write_lines(tmp_path / "rewardbench2" / "t.jsonl", rows)
    benchmark = load_benchmark("rewardbench2", tmp_path)
    scores = [[3, 1], [5, 4, 1], [0, 1], [5, 4, 1], [9, 8, 0], [1, 0, 0, 0]]
    summary = benchmark.summarize(benchmark.items, scores)
    first = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1)
    second = 0.3 + 0 + 0.2 + 0 + 0.01 * math.tanh(-2)
    assert summary["subsets"]["Ties"] == {"accuracy": pytest.approx((first + second) / 2), "n": 4}
    assert summary["overall"] == pytest.approx(((first + second) / 2 + 1) / 2)


def test_rewardbench2_rows_of_the_wrong_form_are_skipped(tmp_path):
    bad = [
        rewardbench2_row("1", "Math", right=2),
        rewardbench2_row("7", "Ties"),
        rewardbench2_row("2", "Math", wrong=0),
    ]
    write_lines(tmp_path / "rewardbench2" / "t.jsonl", [*bad, rewardbench2_row("3", "Math")])
    benchmark = load_benchmark("rewardbench2", tmp_path)
    assert [item.id for item in benchmark.items] == ["3"]
    for message, words in zip(benchmark.skipped, ("one response", "ref:N or tied:N", "`rejected`"), strict=True):
        assert words in message


# RM-Bench


def rm_bench(tmp_path, domains: dict[str, int]):
    for domain, count in domains.items():
        write_json(tmp_path / "rm-bench" / f"{domain}_filtered.json", [rm_bench_row(n) for n in range(count)])
    return load_benchmark("rm-bench", tmp_path)


def test_rm_bench_levels_are_plain_means_over_domains_and_safety_pools_its_files(tmp_path):
    benchmark = rm_bench(tmp_path, {"chat": 1, "safety-refuse": 3, "safety-response": 1})
    likes_style, perfect, always_wrong = [1, 2, 3, 1, 2, 3], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]
    summary = benchmark.summarize(benchmark.items, [likes_style, perfect, perfect, always_wrong, likes_style])
    subsets = summary["subsets"]
    assert subsets["chat"] == {"accuracy": pytest.approx(1 / 3), "n": 1, "easy": 1, "normal": 0, "hard": 0}
    assert subsets["safety-refuse"]["hard"] == pytest.approx(2 / 3)
    # safety: easy (2 + 1) / 4, normal 2 / 4, hard 2 / 4
    assert summary["averages"] == pytest.approx(
        {"chat": 1 / 3, "safety": (0.75 + 0.5 + 0.5) / 3, "easy": 0.875, "normal": 0.25, "hard": 0.25}
    )
    assert summary["overall"] == pytest.approx((1 / 3 + 1.75 / 3) / 2)
    assert benchmark.short_subsets(benchmark.items)["math"] == "0 of 529"


def test_rm_bench_rows_are_known_by_domain_and_id_in_the_total_file_too(tmp_path):
    rows = [rm_bench_row(8, domain="chat"), rm_bench_row(8, domain="code"), rm_bench_row(8, domain="chat")]
    write_json(tmp_path / "rm-bench" / "total_dataset.json", rows)
    write_json(tmp_path / "rm-bench" / "chat_filtered.json", [rm_bench_row(1)])  # the total file has these rows too
    benchmark = load_benchmark("rm-bench", tmp_path)
    assert [item.key for item in benchmark.items] == [("chat", "8"), ("code", "8")]
    assert "came before" in benchmark.skipped[0]


def test_rm_bench_verdicts_fill_the_same_matrix(tmp_path):
    benchmark = rm_bench(tmp_path, {"chat": 1, "code": 1})
    likes_style = [1, 2, 3, 1, 2, 3]
    judge = [verdict(benchmark.items[0], [i, j], likes_style) for i in range(3) for j in range(3, 6)]
    judge += [verdict(benchmark.items[0], [j, i], likes_style) for i in range(3) for j in range(3, 6)]
    summary = summarize(benchmark.by_verdicts, benchmark.items, [judge, judge[:8]])
    # ties on the diagonal are worth half
    assert summary["subsets"] == {"chat": {"accuracy": 0.5, "n": 1, "easy": 1, "normal": 0.5, "hard": 0}}


def verdict(item, order, worth):
    """What a judge that sees `worth` says of two responses."""
    first, second = order
    return Verdict(tuple(order), TIE if worth[first] == worth[second] else max(order, key=lambda i: worth[i]))


# JudgeBench


def judgebench(tmp_path, labels: str):
    rows = [judgebench_row(f"p{n}", "mmlu-pro-law", f"{x}>{'AB'.replace(x, '')}") for n, x in enumerate(labels)]
    write_lines(tmp_path / "judgebench-gpt" / "gpt.jsonl", rows)
    return load_benchmark("judgebench-gpt", tmp_path)


def test_judgebench_never_takes_the_other_models_file_for_its_own(tmp_path):
    write_lines(tmp_path / "judgebench" / "claude.jsonl", [judgebench_row("p", "mmlu-pro-law", "A>B")])
    assert len(load_benchmark("judgebench-claude", tmp_path).items) == 1
    with pytest.raises(InputError, match="a file named after gpt expected, found claude.jsonl"):
        load_benchmark("judgebench-gpt", tmp_path)


def test_judgebench_reward_model_tie_counts_for_b(tmp_path):
    benchmark = judgebench(tmp_path, "BBBAA")
    summary = benchmark.summarize(benchmark.items, [[1, 1], [0, 0], [2, 1], [1, 1], [2, 1]])
    assert summary["overall"] == 0.6  # right, right, wrong, wrong, right
    assert summary["subsets"] == {"Knowledge": {"accuracy": 0.6, "n": 5}}


def test_judgebench_categories_and_overall_over_pairs(data):
    benchmark = load_benchmark("judgebench-gpt", data)
    assert [item.subset for item in benchmark.items] == ["Knowledge", "Reasoning", "Math", "Coding"]
    assert [item.chosen for item in benchmark.items] == [(0,), (1,), (0,), (1,)]


@pytest.mark.parametrize(
    ("first", "second", "correct"),
    [(0, 0, 1), (0, 1, 0), (1, 1, 0), (0, "tie", 1), ("tie", 1, 0), (0, None, 1), (None, None, 0), ("tie", "tie", 0)],
)
def test_judgebench_judge_is_right_when_the_sum_over_both_orders_is_positive(tmp_path, first, second, correct):
    benchmark = judgebench(tmp_path, "A")
    said = [[Verdict((0, 1), first), Verdict((1, 0), second)]]
    assert summarize(benchmark.by_verdicts, benchmark.items, said)["overall"] == correct


def test_a_pair_judged_in_one_order_only_cannot_count_where_both_are_the_rule(tmp_path):
    benchmark = judgebench(tmp_path, "AA")
    said = [[Verdict((0, 1), 0)], [Verdict((0, 1), 0), Verdict((1, 0), 0)]]
    assert summarize(benchmark.by_verdicts, benchmark.items, said)["subsets"]["Knowledge"]["n"] == 1


# RMB


def test_rmb_best_of_n_needs_every_loser_beaten_strictly_and_cells_are_means_over_rows(tmp_path):
    folder = tmp_path / "rmb-bon" / "BoN_set"
    write_json(folder / "Harmlessness" / "S1.json", [rmb_bon_row(n, "Harmlessness/S1", 2) for n in range(2)])
    write_json(folder / "Harmlessness" / "S2.json", [rmb_bon_row(5, "Harmlessness/S2", 3)])
    write_json(folder / "Helpfulness" / "Code" / "X.json", [rmb_bon_row(6, "Helpfulness/Code/X", 2)])
    benchmark = load_benchmark("rmb-bon", tmp_path)
    summary = benchmark.summarize(benchmark.items, [[3, 2, 2], [3, 3, 0], [4, 1, 2, 3], [0, 1, -1]])
    assert summary["averages"] == pytest.approx({"harmlessness": 2 / 3, "helpfulness": 0})
    assert summary["overall"] == pytest.approx(1 / 3)
    assert summary["subsets"]["Harmlessness/S1"] == {"accuracy": 0.5, "n": 2}


def test_rmb_pairs_with_identical_answers_count_and_cannot_be_won(tmp_path):
    row = rmb_row(1, "Harmlessness/S1", reject={"llm_name": "b", "answer": "good"})
    write_json(tmp_path / "rmb" / "Pairwise_set" / "Harmlessness" / "S1.json", [row, rmb_row(2, "Harmlessness/S1")])
    benchmark = load_benchmark("rmb-pairwise", tmp_path)
    assert benchmark.summarize(benchmark.items, [[1, 1], [2, 1]])["overall"] == 0.5


def test_rmb_best_of_n_without_a_loser_is_refused_and_not_won(tmp_path):
    rows = [rmb_bon_row(n, "Harmlessness/S1", n) for n in range(2)]
    write_json(tmp_path / "rmb-bon" / "BoN_set" / "a.json", rows)
    benchmark = load_benchmark("rmb-bon", tmp_path)
    assert [item.id for item in benchmark.items] == ["1"]
    assert "field `loser_list`" in benchmark.skipped[0]


def test_rmb_judge_wins_a_best_of_n_row_by_every_pair(tmp_path):
    write_json(tmp_path / "rmb-bon" / "BoN_set" / "a.json", [rmb_bon_row(n, "Helpfulness/X", 2) for n in range(3)])
    benchmark = load_benchmark("rmb-bon", tmp_path)
    item = benchmark.items[0]
    won = [verdict(item, [0, 1], [2, 1, 1]), verdict(item, [2, 0], [2, 1, 1])]
    drawn = [verdict(item, [0, 1], [2, 1, 2]), verdict(item, [2, 0], [2, 1, 2])]
    summary = summarize(benchmark.by_verdicts, benchmark.items, [won, drawn, won[:1]])
    assert summary["subsets"]["Helpfulness/X"] == {"accuracy": 0.5, "n": 2}


# LLMBar and EvalBiasBench


def llmbar(tmp_path, **labels: str):
    for subset, digits in labels.items():
        folder = "Natural" if subset == "Natural" else f"Adversarial/{subset}"
        rows = [llmbar_row(n, int(digit)) for n, digit in enumerate(digits)]
        write_json(tmp_path / "llmbar" / folder / "dataset.json", rows)
    return load_benchmark("llmbar", tmp_path)


def test_llmbar_ratings_that_are_equal_or_null_are_right_in_one_of_two_orders(tmp_path):
    benchmark = llmbar(tmp_path, Natural="1221", Manual="2")
    manual, *natural = benchmark.items
    assert [item.chosen[0] for item in natural] == [0, 1, 1, 0]
    summary = benchmark.summarize(benchmark.items, [[1, 2], [2, 1], [2, 1], [3, 3], [None, 3]])
    half = {"accuracy": pytest.approx(0.5), "n": 4, "both_correct": 0.25, "agreement": 0.5}
    assert summary["subsets"] == {
        "Manual": {"accuracy": 1, "n": 1, "both_correct": 1, "agreement": 1},
        "Natural": half,
    }
    assert summary["averages"] == pytest.approx({"adversarial": 1, "both_correct": 0.625, "agreement": 0.75})
    assert summary["overall"] == pytest.approx(0.75)  # the mean of the subsets, not of the rows


def test_llmbar_judge_accuracy_is_the_mean_of_both_orders(tmp_path):
    benchmark = llmbar(tmp_path, Natural="111111")
    said = two_orders((0, 0), (0, 1), (1, 1), (None, 0), (None, None), ("tie", "tie"))
    row = summarize(benchmark.by_verdicts, benchmark.items, said)["subsets"]["Natural"]
    assert row == pytest.approx({"accuracy": (2 + 1 + 0 + 1) / 12, "n": 6, "both_correct": 1 / 6, "agreement": 4 / 6})


def test_evalbiasbench_judge_agreement_takes_two_ties_but_not_two_unreadable_replies(tmp_path):
    rows = {"length bias": [evalbias_row("length bias", n) for n in range(5)], "other": [evalbias_row("other", 0)]}
    write_json(tmp_path / "evalbiasbench" / "biasbench.json", rows)
    benchmark = load_benchmark("evalbiasbench", tmp_path)
    said = two_orders((0, 0), (0, 1), (1, 1), (None, None), ("tie", "tie"), (0, 0))
    summary = summarize(benchmark.by_verdicts, benchmark.items, said)
    expected = {"accuracy": 0.3, "n": 5, "both_correct": 0.2, "agreement": 0.6}
    assert summary["subsets"]["length bias"] == pytest.approx(expected)
    assert summary["overall"] == pytest.approx(5 / 12)
    assert summary["averages"] == pytest.approx({"mean_of_subsets": 0.65, "both_correct": 2 / 6, "agreement": 4 / 6})


def test_evalbiasbench_reward_model_is_strict(data):
    benchmark = load_benchmark("evalbiasbench", data)
    summary = benchmark.summarize(benchmark.items, [[1, 0], [1, 1], [0, 1], [1, 0]])
    assert summary["subsets"]["length bias"]["accuracy"] == pytest.approx(1 / 3)
    assert summary["overall"] == 0.5


def test_evalbiasbench_tie_is_wrong_whichever_response_is_the_right_one(tmp_path):
    rows = [{**evalbias_row("length bias", n), "label": 1 + n % 2} for n in range(4)]
    write_json(tmp_path / "evalbiasbench" / "biasbench.json", {"length bias": rows})
    benchmark = load_benchmark("evalbiasbench", tmp_path)
    # right, tie of a row whose second response is right, tie, second above first where it should be
    assert benchmark.summarize(benchmark.items, [[1, 0], [1, 1], [1, 1], [0, 1]])["overall"] == 0.5


# IFBench


def test_ifbench_levels_go_by_what_the_rejected_response_breaks(tmp_path):
    rows = [ifbench_row(n, broken) for n, broken in enumerate((1, 2, 3, 4, 1))]
    write_json(tmp_path / "ifbench" / "data.json", rows)
    benchmark = load_benchmark("ifbench", tmp_path)
    assert [item.subset for item in benchmark.items] == ["level-3", "level-2", "level-1", "level-1", "level-3"]
    summary = benchmark.summarize(benchmark.items, [[1, 0], [1, 1], [1, 0], [0, 1], [0, 1]])
    assert {name: row["accuracy"] for name, row in summary["subsets"].items()} == {
        "level-3": 0.5,
        "level-2": 0,
        "level-1": 0.5,
    }
    assert summary["overall"] == pytest.approx(2 / 5)
