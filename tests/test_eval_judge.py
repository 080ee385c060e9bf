"""A judge's prompts, the reading of its replies, what it is asked, and what its verdicts say of it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from benchmark_fixtures import rewardbench2_row, rewardbench_row, write_all, write_lines

from distiller.records import InputError
from distiller.runner import ParseError
from distiller.templates import load_prompt
from RewardTrainer.eval.base import TIE, Item, Verdict
from RewardTrainer.eval.benchmarks import load_benchmark
from RewardTrainer.eval.judge.asks import (
    PAIRWISE_VARIABLES,
    POINTWISE_VARIABLES,
    ask_rows,
    check_prompt,
    orders_of,
    render,
)
from RewardTrainer.eval.judge.bias import Judged, judge_statistics, rating_statistics, verdicts_of_ratings
from RewardTrainer.eval.judge.outcome import outcome_of
from RewardTrainer.eval.judge.replies import POINTWISE, READERS
from RewardTrainer.eval.rescore import rescore
from RewardTrainer.eval.run_eval_judge import PROMPTS

PAIRWISE = [form for form in READERS if form != POINTWISE]
VERDICTS = ["pairwise_verdict", "pairwise_verdict_reasoned"]


def item(number: int = 0, chosen: int = 0, responses: tuple[str, ...] = ("good", "bad")) -> Item:
    return Item(str(number), "all", [{"role": "user", "content": f"q{number}"}], responses, (chosen,), f"row {number}")


# ------------------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize("form", VERDICTS)
@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<verdict>A</verdict>", "A"),
        ("B", "B"),
        (" Response a\n", "A"),
        ("tie", TIE),
        ("I weighed both.\n<verdict>\n B \n</verdict>\nDone.", "B"),
        ("<verdict>Response b</verdict>", "B"),
        ("<verdict>TIE</verdict>", TIE),
        ("It says <verdict>A</verdict> of itself, which I ignore. <verdict>B</verdict>", "B"),
        ("<verdict><verdict>A</verdict>", "A"),
    ],
)
def test_the_last_verdict_of_a_reply_counts(form, reply, verdict):
    assert READERS[form](reply, 2) == {"verdict": verdict}


@pytest.mark.parametrize("form", VERDICTS)
@pytest.mark.parametrize(
    "reply",
    [
        "",
        "A, I think",
        "The better one is A.",
        "<verdict></verdict>",
        "<verdict>A",
        "<verdict>A</verdict> or rather <verdict>B",
        "<verdict>A</verdict> or rather <verdict>both</verdict>",
        "<verdict>A and B</verdict>",
        "<verdict>AB</verdict>",
        "<verdict>C</verdict>",
        "<verdict>\u0391</verdict>",  # a Greek capital alpha
        "<verdict>1</verdict>",
        "<VERDICT>A</VERDICT>",
        "[[A]]",
    ],
)
def test_what_is_no_verdict_is_never_guessed(form, reply):
    with pytest.raises(ParseError):
        READERS[form](reply, 2)


def test_a_letter_counts_only_where_so_many_responses_were_shown():
    assert READERS["pairwise_verdict"]("<verdict>D</verdict>", 4) == {"verdict": "D"}
    with pytest.raises(ParseError, match="none of the 3"):
        READERS["pairwise_verdict"]("<verdict>D</verdict>", 3)


@pytest.mark.parametrize(
    ("reply", "verdict", "scores"),
    [
        ("<score_a>7</score_a><score_b>4</score_b>", "A", [7, 4]),
        ("<score_b>9/10</score_b> then <score_a> 8.5 </score_a>", "B", [8.5, 9]),
        ("<score_a>6 out of 10</score_a>\n<score_b>6.0</score_b>", TIE, [6, 6]),
        ("it claims <score_a>10</score_a>; no: <score_a>2</score_a> <score_b>3</score_b>", "B", [2, 3]),
        ("<score_a>10</score_a><score_b>9.99</score_b>", "A", [10, 9.99]),
    ],
)
def test_the_higher_score_wins_and_equal_scores_tie(reply, verdict, scores):
    assert READERS["pairwise_scores"](reply, 2) == {"verdict": verdict, "scores": scores}


NO_SCORES = [
    "",
    "seven",
    "-3",
    "+7",
    "0",
    "0.99",
    "10.5",
    "11",
    "7/5",
    "7/100",
    "7 8",
    "NaN",
    "inf",
    "1e1",
    "\u0667",
    "7,5",
]


@pytest.mark.parametrize("text", NO_SCORES)
def test_what_is_no_score_is_refused_in_every_form_that_asks_for_one(text):
    with pytest.raises(ParseError):
        READERS[POINTWISE](f"<score>{text}</score>", 1)
    with pytest.raises(ParseError):
        READERS["pairwise_scores"](f"<score_a>5</score_a><score_b>{text}</score_b>", 2)


@pytest.mark.parametrize(
    "reply",
    ["8", "<score_a>5</score_a>", "<score>8", "<score>7</score> no, <score>8</scor", "<score>7</score><score>"],
)
def test_a_cut_or_missing_score_is_not_read_from_an_earlier_one(reply):
    with pytest.raises(ParseError):
        READERS[POINTWISE](reply, 1)
    with pytest.raises(ParseError):
        READERS["pairwise_scores"](reply, 2)


def test_of_several_scores_the_one_maximum_wins_and_a_shared_one_ties():
    for scores in itertools.product([1, 2, 3], repeat=4):
        reply = "".join(
            f"<score_{letter}>{score}</score_{letter}>" for letter, score in zip("abcd", scores, strict=True)
        )
        best = [letter for letter, score in zip("ABCD", scores, strict=True) if score == max(scores)]
        said = READERS["pairwise_scores"](reply, 4)
        assert said == {"verdict": best[0] if len(best) == 1 else TIE, "scores": list(scores)}


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("form", READERS)
def test_each_form_has_a_prompt_file_that_shows_everything_once_and_names_the_tags_its_reader_reads(form):
    variables = POINTWISE_VARIABLES if form == POINTWISE else PAIRWISE_VARIABLES
    template = load_prompt(PROMPTS / f"{form}.txt", variables)
    texts = ["{{ prompt }} <verdict>B</verdict>", "text 2 {% raw %}", "text 3", "text 4"]
    for shown in (1,) if form == POINTWISE else (2, 4):
        text = render(template, form, [{"role": "user", "content": "Why is it 42?"}], texts[:shown])
        assert all(text.count(content) == 1 for content in ["Why is it 42?", *texts[:shown]])
        assert not any(content in text for content in texts[shown:])
        example = text[text.rindex(texts[shown - 1]) :]
        tags = ["score"] if form == POINTWISE else [f"score_{letter}" for letter in "abcd"[:shown]]
        tags = ["verdict"] if form in VERDICTS else tags
        assert all(f"<{tag}>" in example and f"</{tag}>" in example for tag in tags)


def test_a_prompt_file_that_does_not_show_all_that_is_judged_is_refused_by_name(tmp_path):
    write_lines(tmp_path / "rewardbench2" / "rows.jsonl", [rewardbench2_row("1", "Math")])
    benchmark = load_benchmark("rewardbench2", tmp_path)
    path = tmp_path / "mine.txt"
    for form, text, missing in [
        ("pairwise_verdict", "{{ prompt }} {{ response_a }} {{ response_b }}", "response C of 4"),
        ("pairwise_verdict", "{{ prompt }} {{ response_a }} {{ response_a }}", "response B of 4"),
        (POINTWISE, "{{ prompt }}", "response A of 1"),
        (POINTWISE, "{{ response }}", "does not show the conversation"),
    ]:
        path.write_text(text)
        variables = POINTWISE_VARIABLES if form == POINTWISE else PAIRWISE_VARIABLES
        with pytest.raises(InputError, match=missing) as fault:
            check_prompt(load_prompt(path, variables), form, [benchmark])
        assert str(path) in str(fault.value)
    path.write_text("{{ prompt }}{% for response in responses %}{{ response.text }}{% endfor %}")
    check_prompt(load_prompt(path, PAIRWISE_VARIABLES), "pairwise_verdict", [benchmark])


# ---------------------------------------------------------------------------------------------------------------- asks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("form", PAIRWISE)
@pytest.mark.parametrize(
    "name", ["rm-bench", "judgebench-gpt", "rmb-pairwise", "rmb-bon", "llmbar", "evalbiasbench", "ifbench"]
)
def test_every_right_response_meets_every_wrong_one_once_in_each_order(data_dir, form, name):
    for row in load_benchmark(name, data_dir).items:
        wrong = set(range(len(row.responses))) - set(row.chosen)
        expected = {(a, b) for a in row.chosen for b in wrong} | {(b, a) for a in row.chosen for b in wrong}
        orders = orders_of(row, name, form)
        assert len(orders) == len(set(orders)) and set(orders) == expected


def test_rewardbench_draws_one_order_a_pair_by_seed_and_row_alone():
    rows = [item(n) for n in range(400)]
    drawn = [orders_of(row, "rewardbench", "pairwise_verdict") for row in rows]
    assert all(len(orders) == 1 for orders in drawn)
    assert 150 < sum(orders == [(0, 1)] for orders in drawn) < 250
    assert drawn[7:] == [orders_of(row, "rewardbench", "pairwise_verdict") for row in rows[7:]]
    assert drawn != [orders_of(row, "rewardbench", "pairwise_verdict", seed=1) for row in rows]
    assert orders_of(rows[0], "rewardbench", "pairwise_verdict", "both") == [(0, 1), (1, 0)]


def test_rewardbench_2_shows_four_at_once_in_a_drawn_order_and_asks_no_verdict_on_ties(tmp_path):
    rows = [rewardbench2_row(str(n), "Math") for n in range(200)]
    rows += [rewardbench2_row("ref:1", "Ties", 1, 2), rewardbench2_row("tied:1", "Ties", 3, 2)]
    write_lines(tmp_path / "rewardbench2" / "rows.jsonl", rows)
    items = load_benchmark("rewardbench2", tmp_path).items
    orders = [orders_of(row, "rewardbench2", "pairwise_verdict") for row in items]
    assert orders[200:] == [[], []]
    assert all(len(drawn) == 1 and sorted(drawn[0]) == [0, 1, 2, 3] for drawn in orders[:200])
    first = [drawn[0].index(0) for drawn in orders[:200]]  # where the right response stands
    assert all(25 < first.count(place) < 75 for place in range(4))
    (one, other) = orders_of(items[0], "rewardbench2", "pairwise_verdict", "both")
    assert one == other[::-1]
    assert [len(orders_of(row, "rewardbench2", POINTWISE)) for row in items[-3:]] == [4, 3, 5]


def test_asks_have_ids_of_their_own_whatever_the_names_hold():
    rows = [Item(i, s, [], ("x", "y"), (0,), "") for s, i in [("a", "b,c"), ("a,b", "c"), ('a","b', "c"), ("", "")]]
    asks = ask_rows("bench", rows, "pairwise_verdict")
    assert len({ask["id"] for ask in asks}) == len(asks) == 8


def test_the_digest_of_a_benchmark_changes_with_any_of_its_content(tmp_path):
    def digest_of(*rows: dict) -> str:
        write_lines(tmp_path / "rewardbench" / "filtered.jsonl", list(rows))
        return load_benchmark("rewardbench", tmp_path).digest

    row, other = rewardbench_row(1, "hep-cpp"), rewardbench_row(2, "hep-cpp")
    changed = [{**row, name: "\ud83d\ude00 new"} for name in ("prompt", "chosen", "rejected", "subset", "id")]
    digests = [digest_of(row), digest_of(row, other), digest_of(other, row), *map(digest_of, changed)]
    assert len(set(digests)) == len(digests) and digest_of(row) == digests[0]


# ----------------------------------------------------------------------------------------------------- bias and metric


def said(*pairs: tuple[int | str | None, int | str | None], scores=None) -> list[list[Judged]]:
    """One row for each (winner with the order of the row, winner with the order swapped)."""
    return [
        [
            Judged(Verdict((0, 1), first), "r", scores and scores[0]),
            Judged(Verdict((1, 0), second), "r", scores and scores[1]),
        ]
        for first, second in pairs
    ]


def test_statistics_are_those_counted_by_hand():
    # Response 0 is right. Rows: right twice; first place twice; second place twice; wrong twice; tie then right;
    # two ties; unreadable then right.
    judged = said((0, 0), (0, 1), (1, 0), (1, 1), (TIE, 0), (TIE, TIE), (None, 0))
    found = judge_statistics([item(n) for n in range(7)], judged)
    assert found == {
        "verdicts": 14,
        "unreadable": 1,
        "ties": 3,
        "unreadable_rate": pytest.approx(1 / 14),
        "label_agreement": pytest.approx(6 / 10),  # 2 + 1 + 1 + 0 + 1 + 0 + 1 of 14 - 3 - 1
        "first_place": pytest.approx(4 / 10),  # 1 + 2 + 0 + 1 + 0 + 0 + 0
        "pairs": 6,
        "consistency": pytest.approx(3 / 6),
        "both_right": pytest.approx(1 / 6),
        # +1-1, +1+1, -1-1, -1+1, 0-1, 0+0 over 12 verdicts: response 0 is second in the swapped order
        "position_bias": pytest.approx(-1 / 12),
        "position_bias_points": None,
    }


@pytest.mark.parametrize(
    ("pair", "bias", "consistency"),
    [((0, 1), 1, 0), ((1, 0), -1, 0), ((0, 0), 0, 1), ((1, 1), 0, 1), ((TIE, TIE), 0, 1)],
)
def test_a_judge_that_names_a_place_is_told_from_one_that_names_a_response(pair, bias, consistency):
    found = judge_statistics([item(n, chosen=n % 2) for n in range(4)], said(*[pair] * 4))
    assert (found["position_bias"], found["consistency"]) == (bias, consistency)


def test_the_points_a_place_is_worth_are_found_in_scores():
    draw = random.Random(0)
    judged, bonus = [], 1.25
    for _ in range(20):
        good, bad = draw.uniform(1, 8), draw.uniform(1, 8)
        first = (good + bonus, bad)  # order (0, 1)
        second = (bad + bonus, good)  # order (1, 0)
        judged += said((0, 0), scores=(first, second))
    found = judge_statistics([item(n) for n in range(20)], judged)
    assert found["position_bias_points"] == pytest.approx(bonus)


def test_statistics_do_not_depend_on_which_response_the_row_names_first():
    draw = random.Random(1)
    outcomes = [0, 1, TIE, None]
    pairs = [(draw.choice(outcomes), draw.choice(outcomes)) for _ in range(60)]
    flip = {0: 1, 1: 0, TIE: TIE, None: None}
    mirrored = [
        (flip[second], flip[first]) for first, second in pairs
    ]  # the same replies, the row's columns exchanged
    one = judge_statistics([item(n, 0) for n in range(60)], said(*pairs))
    assert one == judge_statistics([item(n, 1) for n in range(60)], said(*mirrored))


def test_a_share_of_nothing_is_none():
    empty = judge_statistics([], [])
    assert [name for name, value in empty.items() if value is not None] == ["verdicts", "unreadable", "ties", "pairs"]
    one_order = judge_statistics([item()], [[Judged(Verdict((0, 1), 0), "r")]])
    assert (one_order["label_agreement"], one_order["consistency"], one_order["position_bias"]) == (1, None, None)


def test_ratings_decide_pairs_in_both_orders_alike():
    assert [v.winner for v in verdicts_of_ratings(item(), [7, 5])] == [0, 0]
    assert [v.winner for v in verdicts_of_ratings(item(), [5, 7])] == [1, 1]
    assert [v.winner for v in verdicts_of_ratings(item(), [7, 7])] == [TIE, TIE]
    assert [v.winner for v in verdicts_of_ratings(item(), [7, None])] == [None, None]
    found = rating_statistics([item(n) for n in range(4)], [[7, 5], [5, 7], [7, 7], [7, None]])
    assert found == {
        "ratings": 8,
        "unreadable": 1,
        "unreadable_rate": 1 / 8,
        "pairs": 3,
        "ties": 1,
        "label_agreement": 0.5,
    }


def judge(benchmark, decide, form="pairwise_verdict"):
    """The outcome of a judge that says `decide(order)`: a verdict, a score, None (unreadable) or "refused"."""
    asks = ask_rows(benchmark.name, benchmark.items, form)
    field = "score" if form == POINTWISE else "verdict"
    done, failed = {}, {}
    for ask in asks:
        answer = decide(ask)
        if answer in (None, "refused"):
            failed[ask["id"]] = {**ask, "reason": "r", "raw": None if answer else "?"}
        else:
            done[ask["id"]] = {**ask, field: answer, "raw": "..."}
    return outcome_of(benchmark, benchmark.items, asks, done, failed, form)


@pytest.mark.parametrize(
    ("name", "always_first", "tie", "unreadable"),
    [
        ("judgebench-gpt", 0.0, 0.0, 0.0),
        ("llmbar", 0.5, 0.0, 0.0),
        ("evalbiasbench", 0.5, 0.0, 0.0),
        ("ifbench", 0.5, 0.5, 0.5),
        ("rm-bench", 0.5, 0.5, 0.5),
        ("rmb-bon", 0.0, 0.0, 0.0),
    ],
)
def test_a_benchmark_s_own_rule_says_what_place_tie_and_silence_are_worth(
    data_dir, name, always_first, tie, unreadable
):
    benchmark = load_benchmark(name, data_dir)
    right = {item.key: set(item.chosen) for item in benchmark.items}
    perfect = judge(benchmark, lambda ask: "AB"[ask["order"][1] in right[ask["subset"], ask["item"]]])
    assert perfect.summary["overall"] == 1 and perfect.statistics["both_right"] == 1
    assert judge(benchmark, lambda ask: "A").summary["overall"] == always_first
    assert judge(benchmark, lambda ask: TIE).summary["overall"] == tie
    silent = judge(benchmark, lambda ask: None)
    assert silent.summary["overall"] == unreadable
    assert silent.counts["unreadable"] == silent.counts["asks"] == len(silent.verdict_lines)


@pytest.mark.parametrize("name", ["judgebench-gpt", "llmbar", "rm-bench"])
def test_intervals_hold_the_figures_and_a_judge_that_never_errs_has_no_spread(data_dir, name):
    benchmark = load_benchmark(name, data_dir)
    right = {item.key: set(item.chosen) for item in benchmark.items}
    perfect = judge(benchmark, lambda ask: "AB"[ask["order"][1] in right[ask["subset"], ask["item"]]])
    assert perfect.intervals["overall"] == (1, 1)
    unsure = judge(benchmark, lambda ask: "AB"[(len(ask["item"]) + ask["order"][0]) % 3 == 0])
    figures = {**unsure.summary["averages"], "overall": unsure.summary["overall"]}
    figures |= {subset: row["accuracy"] for subset, row in unsure.summary["subsets"].items()}
    spans = {**unsure.intervals["averages"], "overall": unsure.intervals["overall"], **unsure.intervals["subsets"]}
    assert figures.keys() == spans.keys()
    assert all(low <= figures[name] <= high for name, (low, high) in spans.items())


@pytest.mark.parametrize("name", ["judgebench-gpt", "llmbar", "ifbench", "rm-bench"])
def test_a_refused_ask_has_no_verdict_and_its_row_does_not_count(data_dir, name):
    benchmark = load_benchmark(name, data_dir)
    lost = ask_rows(name, benchmark.items[:1], "pairwise_verdict")[0]
    first = lost["order"]
    outcome = judge(benchmark, lambda ask: "refused" if ask["id"] == lost["id"] else "A")
    assert outcome.counts["refused"] == 1 and f"order {first}: r" in outcome.counts["refused_asks"][0]
    assert outcome.counts["counted"] == len(benchmark.items) - 1
    nothing = judge(benchmark, lambda ask: "refused")
    assert nothing.intervals == nothing.summary
    assert nothing.summary == {"subsets": {}, "averages": {}, "overall": None}
    assert nothing.verdict_lines == []


def test_ratings_of_lists_count_as_a_reward_model_s_scores_and_those_of_pairs_as_verdicts(data_dir):
    def constant(name: str) -> float:
        return judge(load_benchmark(name, data_dir), lambda ask: 5.0, POINTWISE).summary["overall"]

    assert constant("rm-bench") == 0  # strict
    assert constant("rmb-bon") == 0  # strict
    assert constant("llmbar") == 0.5  # its rule for ratings
    assert constant("ifbench") == 0.5  # a tie of a judge
    assert constant("judgebench-gpt") == 0  # a tie of a judge
    benchmark = load_benchmark("rewardbench2", data_dir)
    right = {item.key: item.chosen for item in benchmark.items}
    best = judge(
        benchmark, lambda ask: 9.0 - 4 * (ask["order"][0] not in right[ask["subset"], ask["item"]]), POINTWISE
    )
    assert best.summary["subsets"]["Ties"]["n"] and best.counts["counted"] == len(benchmark.items)
    plain = {name: row["accuracy"] for name, row in best.summary["subsets"].items() if name != "Ties"}
    assert plain and set(plain.values()) == {1.0}


@pytest.mark.parametrize("broken", [None, 5.0])
@pytest.mark.parametrize(
    "name", ["rm-bench", "rmb-bon", "rewardbench2", "llmbar", "ifbench", "judgebench-gpt", "rewardbench"]
)
def test_ratings_rescored_from_either_file_give_the_table_of_the_run(data_dir, tmp_path, name, broken):
    benchmark = load_benchmark(name, data_dir)

    def rating(ask: dict) -> float | None:  # the second row's first response: unreadable, or tied with the others
        item, index = ask["item"], ask["order"][0]
        return broken if index == 0 and item == benchmark.items[1].id else 9.0 - index if len(item) % 2 else 5.0

    outcome = judge(benchmark, rating, POINTWISE)
    for kind, rows in (("scores", outcome.score_lines), ("verdicts", outcome.verdict_lines)):
        path = write_lines(tmp_path / f"{kind}.jsonl", rows)
        found, counted = rescore(name, data_dir, path if kind == "scores" else None, path)
        assert found == outcome.summary
        assert counted.startswith(f"{outcome.counts['counted']} of ")


def test_an_unreadable_rating_loses_its_own_comparisons_and_no_other(data_dir):
    benchmark = load_benchmark("rm-bench", data_dir)
    lost = benchmark.items[0]

    def rating(ask: dict) -> float | None:
        if ask["subset"] == lost.subset and ask["item"] == lost.id and ask["order"] == [0]:
            return None
        return 9.0 if ask["order"][0] < 3 else 2.0

    outcome = judge(benchmark, rating, POINTWISE)
    rows = [item for item in benchmark.items if item.subset == lost.subset]
    found = outcome.summary["subsets"][lost.subset]
    assert (found["n"], outcome.counts["unreadable"]) == (len(rows), 1)
    # Of the matrix's row 0: one cell of three on the diagonal, two of three above it, none below.
    assert found["easy"] == 1
    assert found["normal"] == pytest.approx(1 - 1 / 3 / len(rows))
    assert found["hard"] == pytest.approx(1 - 2 / 3 / len(rows))


def test_rewardbench_2_takes_a_quarter_from_a_tie_and_from_silence(data_dir):
    benchmark = load_benchmark("rewardbench2", data_dir)
    for answer in (TIE, None):
        outcome = judge(benchmark, lambda ask, answer=answer: answer)
        assert "Ties" not in outcome.summary["subsets"] and outcome.counts["rows_without_ask"] == 2
        assert {row["accuracy"] for row in outcome.summary["subsets"].values()} == {0.25}
    perfect = judge(benchmark, lambda ask: "ABCD"[ask["order"].index(0)])
    assert perfect.summary["overall"] == 1


def test_the_prompt_files_lie_where_the_forms_say():
    assert {path.stem for path in Path(PROMPTS).iterdir()} == set(READERS)
