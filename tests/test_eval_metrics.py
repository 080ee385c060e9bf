"""Metrics against tables worked out by hand, and how rows become what they are computed from."""

import math

import datasets
import numpy as np
import pytest
from eval_fixtures import pair, styled, write_jsonl

from distiller.records import InputError
from RewardTrainer.eval.base import subset_means
from RewardTrainer.eval.benchmarks import example, load_benchmark, preference
from RewardTrainer.eval.metrics import gap_margin_agreement, strict_accuracy, style_levels, style_matrix


def test_a_tie_is_a_miss():
    assert strict_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == 0.5


@pytest.mark.parametrize(("chosen", "rejected"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[2.0]])])
def test_accuracy_of_no_pairs_or_of_unequal_lists_is_refused(chosen, rejected):
    with pytest.raises(ValueError, match="pairs"):
        strict_accuracy(chosen, rejected)


def test_style_matrix_puts_the_chosen_style_in_rows_and_ties_as_misses():
    chosen = [[1, 2, 3], [5, 0, 1]]
    rejected = [[2, 2, 0], [4, 5, 1]]
    # prompt 1: 1>(2,2,0) = 0 0 1;  2>(2,2,0) = 0 0 1;  3>(2,2,0) = 1 1 1
    # prompt 2: 5>(4,5,1) = 1 0 1;  0>(4,5,1) = 0 0 0;  1>(4,5,1) = 0 0 0
    assert style_matrix(chosen, rejected).tolist() == [[0.5, 0, 1], [0, 0, 0.5], [0.5, 0.5, 0.5]]


def test_levels_hard_above_the_diagonal_easy_below():
    matrix = style_matrix([[1, 2, 3], [5, 0, 1]], [[2, 2, 0], [4, 5, 1]])
    levels = style_levels(matrix)
    assert levels["hard"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert levels["normal"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert levels["easy"] == pytest.approx((0 + 0.5 + 0.5) / 3)


def test_a_model_that_only_likes_rich_style_is_perfect_on_easy_and_fails_on_the_rest():
    levels = style_levels(style_matrix([[1, 2, 3]] * 4, [[1, 2, 3]] * 4))
    assert levels == {"easy": 1.0, "normal": 0.0, "hard": 0.0}


def test_gap_margin_agreement_by_hand():
    # gaps centred -1 0 1, margins centred -2 1 1: Sxy 3, Sxx 2, Syy 6; ranks 0 1 2 against 0 1.5 1.5: Sxy 1.5, 2, 1.5
    agreement = gap_margin_agreement([1, 2, 3], [0, 3, 3])
    assert agreement["gap_margin_pearson"] == pytest.approx(3 / math.sqrt(12))
    assert agreement["gap_margin_spearman"] == pytest.approx(1.5 / math.sqrt(3))
    assert agreement["gap_margin_slope"] == pytest.approx(3 / 6)


def test_equal_margins_share_their_mean_rank():
    # ranks 0 1 2 3 against 0 1.5 1.5 3: Sxy 4.5, Sxx 5, Syy 4.5
    agreement = gap_margin_agreement([1, 2, 3, 4], [0, 3, 3, 9])
    assert agreement["gap_margin_spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_calibrated_gaps_have_slope_and_correlation_one():
    agreement = gap_margin_agreement([0.5, 2.0, -1.0], [0.5, 2.0, -1.0])
    assert list(agreement.values()) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(("gaps", "margins"), [([1.0], [2.0]), ([1.0, 2.0], [3.0, 3.0]), ([], [])])
def test_agreement_that_does_not_exist_is_none_and_not_a_number(gaps, margins):
    assert set(gap_margin_agreement(gaps, margins).values()) == {None}


def test_constant_gaps_have_slope_zero_and_no_correlation():
    assert list(gap_margin_agreement([2.0, 2.0], [1.0, 3.0]).values()) == [None, None, 0.0]


def test_preference_accuracy_is_per_subset_and_overall_over_pairs(tmp_path):
    rows = [pair(n, subset="math" if n < 3 else "chat") for n in range(4)]
    benchmark = load_benchmark(str(write_jsonl(tmp_path / "pairs.jsonl", rows)), None)
    summary = benchmark.summarize(benchmark.items, [[1, 0], [0, 0], [2, 1], [0, 5]])
    assert summary["subsets"] == {"math": {"accuracy": 2 / 3, "n": 3}, "chat": {"accuracy": 0.0, "n": 1}}
    assert summary["averages"] == {"mean_of_subsets": pytest.approx(1 / 3)}
    assert summary["overall"] == 0.5


def test_margins_are_compared_on_the_rows_that_have_one(tmp_path):
    rows = [pair(0, margin=1), pair(1), pair(2, margin=3.0), pair(3, margin=None)]
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", rows))
    summary = benchmark.summarize(benchmark.items, [[2, 0], [9, 0], [6, 0], [7, 0]])
    assert summary["averages"]["gap_margin_slope"] == pytest.approx(2.0)
    assert summary["subsets"] == {"all": {"accuracy": 1.0, "n": 4}}


def test_a_pair_with_a_null_score_is_in_neither_the_accuracy_nor_the_margins(tmp_path):
    rows = [pair(0, margin=1), pair(1, margin=50), pair(2, margin=3), pair(3, margin=2)]
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", rows))
    summary = benchmark.summarize(benchmark.items, [[2, 0], [None, 0], [6, 0], [0, 0]])
    assert summary["subsets"] == {"all": {"accuracy": pytest.approx(2 / 3), "n": 3}}
    # margins 1 3 2 around 2, gaps 2 6 0 around 8/3: Sxy (-1)(-2/3) + 1 (10/3) + 0 = 4, Sxx 2
    assert summary["averages"]["gap_margin_slope"] == pytest.approx(4 / 2)


def test_a_row_with_one_value_missing_counts_in_no_column():
    values = np.array([[1.0, 0.0], [0.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    means, sizes = subset_means(("accuracy", "other"), ["a", "a", "a", "b"], values)
    assert (means, sizes) == ({"a": {"accuracy": 0.5, "other": 0.5}}, {"a": 2})


def test_preference_reads_trl_conversations_with_and_without_a_prompt(tmp_path):
    question = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which metal?"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("tin", "red")}
    rows = [
        {"prompt": question, "chosen": answers["tin"], "rejected": answers["red"]},
        {"chosen": [*question[1:], *answers["tin"]], "rejected": [*question[1:], *answers["red"]]},
    ]
    items = preference.load(write_jsonl(tmp_path / "pairs.jsonl", rows)).items
    assert [item.prompt for item in items] == [question, question[1:]]
    assert [item.responses for item in items] == [("tin", "red")] * 2
    assert items[0].pairs() == [(0, 1)]


def test_preference_reads_a_json_array(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text("[" + ",".join(f'{{"prompt": "p{n}", "chosen": "a", "rejected": "b"}}' for n in range(3)) + "]")
    assert len(preference.load(path).items) == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{not json", ["line 2", "JSON"]),
        (pair(7, chosen=""), ["line 2", "`chosen`", "empty"]),
        (pair(7, rejected="   "), ["line 2", "`rejected`", "empty"]),
        (pair(7, prompt=None), ["line 2", "`prompt`", "null"]),
        (pair(7, rejected=5), ["line 2", "`rejected`"]),
        (pair(0), ["line 2", "id"]),
        (pair(7, margin="large"), ["line 2", "`margin`"]),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": Infinity}', ["line 2", "NaN"]),
        (pair(7, margin=10**400), ["line 2", "`margin`"]),
        (pair(7, subset=["x"]), ["row7", "`subset`"]),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', ["line 2", "`chosen`", "surrogate"]),
    ],
)
def test_a_bad_row_is_skipped_with_its_place_and_field_and_the_rest_goes_on(tmp_path, bad, words):
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", [pair(0), bad, pair(2)]))
    assert [item.id for item in benchmark.items] == ["row0", "row2"]
    (message,) = benchmark.skipped
    assert all(word in message for word in ["pairs.jsonl", *words])


@pytest.mark.parametrize(
    ("field", "value"),
    [("chosen", ["a", "b"]), ("rejected", "text"), ("chosen", ["a", "b", None]), ("rejected", ["a", " ", "c"])],
)
def test_example_rows_without_three_answers_of_each_kind_are_skipped(tmp_path, field, value):
    (tmp_path / "example").mkdir()
    rows = [styled(0), styled(1, **{field: value}), styled(2)]
    write_jsonl(tmp_path / "example" / "benchmark.jsonl", rows)
    benchmark = example.load(tmp_path)
    assert [item.id for item in benchmark.items] == ["0", "2"]
    assert f"`{field}" in benchmark.skipped[0] and "id 1" in benchmark.skipped[0]


def test_example_keeps_the_order_of_the_row_and_pairs_every_style_with_every_style(tmp_path):
    (tmp_path / "example").mkdir()
    write_jsonl(tmp_path / "example" / "benchmark.jsonl", [styled(0)])
    (item,) = example.load(tmp_path).items
    assert list(item.responses) == styled(0)["chosen"] + styled(0)["rejected"]
    assert item.pairs() == [(right, wrong) for right in range(3) for wrong in range(3, 6)]
    summary = example.load(tmp_path).summarize([item], [[1, 2, 3, 1, 2, 3]])
    assert summary["averages"] == {"easy": 1.0, "normal": 0.0, "hard": 0.0, "mean": pytest.approx(1 / 3)}
    assert summary["overall"] == summary["averages"]["mean"]


def test_an_unknown_benchmark_is_refused_with_the_known_names(tmp_path):
    with pytest.raises(InputError, match="no file in .*, and none of the benchmarks; did you mean example?"):
        load_benchmark("exampel", None)
    with pytest.raises(InputError, match="none of the benchmarks: .*example, .*rewardbench"):
        load_benchmark("nothing.jsonl", None)
    with pytest.raises(InputError, match="nothing.jsonl does not exist: check the name"):
        load_benchmark("../data/nothing.jsonl", None)


def test_preference_data_is_whatever_the_stages_read(tmp_path):
    rows = [{"prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
    parts = {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows[1:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (whole,), (half,) = (load_benchmark(f"{tmp_path}/saved{split}", None).items for split in ("", ":train"))
    assert whole.responses == half.responses == ("c0", "r0")
    assert [item.responses for item in load_benchmark(f"{tmp_path}/saved:test", None).items] == [
        ("c1", "r1"),
        ("c2", "r2"),
    ]
