"""What a grade is in each score mode, the check of an edit by a blind second opinion, and the closing reports."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from stage_driver import drive, reply, weighed

from distiller.engine import AskError, Completion, EngineDead
from distiller.runner import Done, Failed, Filtered
from score import cali_score_vllm as cali
from score import score_orig_vllm as score_orig
from score.conversation import expected_score, grade_choices, position_bias, usable_grades

ROW = {"id": "r1", "prompt": "Who?", "chosen": "Armstrong.", "rejected": "It was Aldrin, in 1969.", "mark": [1]}
REFINED = {
    "teacher_response": "Neil Armstrong.",
    "diagnosis": "Wrong man.",
    "refined_response": "It was Armstrong, in 1969.",
    "edit_similarity": 0.8,
}
SCORED = {**ROW, **REFINED, "chosen_score": 9.0, "rejected_score": 3.5}


def grades(a, b) -> str:
    return f"First <score_a>{a}</score_a>, then <score_b> {b} </score_b>."


@pytest.fixture
def prompts(tmp_path):
    texts = {
        "refine": "{{ prompt }}|{{ rejected }}|{{ teacher_response }}",
        "strength": "{{ prompt }}|A {{ response_a }}|B {{ response_b }}",
        "calibrate": "It got {{ rejected_score }}.",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return {name: str(tmp_path / f"{name}.txt") for name in texts}


def orig_work(prompts, **values):
    return score_orig.make_work(score_orig.ScoreOrigArguments(prompt_file=prompts["strength"], **values))


def cali_work(prompts, **values):
    files = {f"{name}_prompt_file": prompts[name] for name in ("refine", "strength")}
    return cali.make_work(cali.CaliScoreArguments(prompt_file=prompts["calibrate"], **files, **values))


# ------------------------------------------------------------------------------------------------------ expected score


def test_the_expected_score_is_the_mean_of_the_ten_weighted_by_probability():
    draw = random.Random(0)
    for scale in (1.0, 1e-3, 1e-30):
        weights = [draw.random() * scale / 10 for _ in range(10)]
        mean, mass = expected_score([math.log(weight) for weight in weights])
        brute = sum(score * weight for score, weight in enumerate(weights, 1)) / sum(weights)
        assert mean == pytest.approx(brute) and mass == pytest.approx(sum(weights))
    certain = [-1e4] * 10
    certain[9] = 0.0
    assert expected_score(certain) == (10.0, 1.0)
    assert expected_score([-2000.0] * 10)[0] == pytest.approx(5.5)  # no underflow
    assert expected_score([-math.inf] * 10)[1] == 0


def test_the_grade_is_put_in_doubt_where_it_stands_and_the_rest_stays_as_the_teacher_wrote_it():
    text = "It claims <score>9</score>.\nNo:\n<score>\n 7.5 / 10\n</score> Good."
    answer = Completion(text, "hm", "stop", 1, 1, None, prefix="<think>\nhm\n</think>\n\n")
    choices = grade_choices(answer, "score")
    assert choices.prefill == "<think>\nhm\n</think>\n\n" + "It claims <score>9</score>.\nNo:\n<score>\n "
    assert choices.rest == " / 10\n</score> Good." and choices.texts == tuple(str(n) for n in range(1, 11))


# --------------------------------------------------------------------------------------------------------- score modes


def test_expected_mode_weighs_every_grade_of_the_pair_after_one_reply_an_order(prompts):
    replies = [grades(8, 3), weighed({8: 0.5, 9: 0.25}), weighed({3: 0.9, 10: 0.1})]
    replies += [grades(5, 7), weighed({5: 1.0}), weighed({6: 0.3, 7: 0.3})]
    outcome, asks = drive(orig_work(prompts, score_mode="expected"), ROW, replies)
    first, b, second = asks[0], asks[2], asks[3]
    assert first.choices is None and second.choices is None and first.messages != second.messages
    assert b.messages == first.messages and b.choices.prefill == "First <score_a>8</score_a>, then <score_b> "
    assert b.choices.rest == " </score_b>." and asks[1].choices.prefill == "First <score_a>"
    by_order = outcome.row["grades_by_order"]
    assert by_order[0] == pytest.approx((25 / 3, 3.7)) and by_order[1] == pytest.approx((6.5, 5.0))
    assert outcome.row["chosen_score"] == pytest.approx((25 / 3 + 6.5) / 2)


def test_expected_mode_weighs_the_calibrated_score_and_the_strength_it_needs_first(prompts):
    work = cali_work(prompts, score_mode="expected")
    outcome, asks = drive(work, SCORED, ["Better. <score>6</score>", weighed({6: 0.5, 8: 0.5})])
    assert outcome.row["chosen_score"] == pytest.approx(7.0) and outcome.row["margin"] == pytest.approx(3.5)
    assert asks[1].messages == asks[0].messages and asks[1].choices.prefill == "Better. <score>"
    pair = [grades(8, 3), weighed({8: 1.0}), weighed({3: 1.0}), grades(3, 8), weighed({4: 1.0}), weighed({8: 1.0})]
    outcome, asks = drive(work, {**ROW, **REFINED}, [*pair, "<score>6</score>", weighed({6: 1.0})])
    assert outcome.row["rejected_score"] == pytest.approx(3.5)
    assert asks[-1].messages[-1]["content"] == "It got 3.5."


def test_a_reply_whose_ten_scores_have_hardly_any_probability_is_asked_again_and_then_fails(prompts):
    work = cali_work(prompts, score_mode="expected", max_tries=2)
    unlikely = weighed({7: 0.02, 8: 0.03})
    outcome, asks = drive(work, SCORED, ["<score>7.5</score>", unlikely, "<score>8</score>", weighed({8: 0.9})])
    assert outcome.row["chosen_score"] == pytest.approx(8.0) and asks[0].seed != asks[2].seed
    outcome, _ = drive(work, SCORED, ["<score>7.5</score>", unlikely, "<score>7.5</score>", unlikely])
    assert isinstance(outcome, Failed) and "0.05 of the probability" in outcome.reason
    assert outcome.raw == "<score>7.5</score>"
    impossible = replace(unlikely, choice_logprobs=(-math.inf,) * 10)
    outcome, _ = drive(work, SCORED, ["<score>7.5</score>", impossible] * 2)
    assert isinstance(outcome, Failed) and "only 0 of the probability" in outcome.reason


def test_an_engine_that_refuses_to_weigh_fails_the_row_and_nothing_is_made_up(prompts):
    work = cali_work(prompts, score_mode="expected")
    outcome, _ = drive(work, SCORED, ["<score>7</score>", AskError("too long")])
    assert outcome == Failed("calibrated score: too long", "<score>7</score>")


def test_a_reply_whose_thinking_the_server_took_away_ends_the_command(prompts):
    taken = Completion("<score>7</score>", "hm", "stop", 1, 1, None, prefix=None)
    with pytest.raises(EngineDead, match="reasoning parser.*--score_mode mean"):
        drive(cali_work(prompts, score_mode="expected"), SCORED, [taken])
    assert isinstance(drive(cali_work(prompts), SCORED, [taken])[0], Done)


def test_mean_mode_averages_so_many_replies_in_each_order(prompts):
    replies = [grades(8, 3), grades(5, 7), grades(9, 4), grades(4, 10)]
    outcome, asks = drive(orig_work(prompts, score_mode="mean", num_score_samples=2), ROW, replies)
    assert outcome.row["grades_by_order"] == [(8, 3), (7, 5), (9, 4), (10, 4)]
    assert (outcome.row["chosen_score"], outcome.row["rejected_score"]) == (8.5, 4.0)
    assert len({ask.seed for ask in asks}) == 4
    scores = [f"<score>{n}</score>" for n in (6, 7)]
    work = cali_work(prompts, score_mode="mean", num_score_samples=2)
    outcome, asks = drive(work, {**ROW, **REFINED}, [*replies, *scores])
    assert (outcome.row["rejected_score"], outcome.row["chosen_score"]) == (4.0, 6.5)
    assert len({ask.seed for ask in asks}) == 6


def test_sample_mode_asks_what_it_always_asked(prompts):
    _, asks = drive(cali_work(prompts), {**ROW, **REFINED}, [grades(8, 3), grades(4, 7), "<score>6</score>"])
    _, again = drive(cali_work(prompts), SCORED, ["<score>6</score>"])
    assert asks[2].seed == again[0].seed and all(ask.choices is None for ask in asks)


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_asks_about_the_edit_and_the_rejected_response_in_both_orders_without_saying_which_is_which(prompts):
    work = cali_work(prompts, verify=True)
    outcome, asks = drive(work, SCORED, ["<score>6</score>", grades(8, 3), grades(4, 6)])
    blind = [ask.messages for ask in asks[1:]]
    assert blind == [
        [{"role": "user", "content": "Who?|A It was Armstrong, in 1969.|B It was Aldrin, in 1969."}],
        [{"role": "user", "content": "Who?|A It was Aldrin, in 1969.|B It was Armstrong, in 1969."}],
    ]
    assert outcome.row["verified"] is True and outcome.row["verify_grades_by_order"] == [(8, 3), (6, 4)]
    assert (outcome.row["chosen_score"], outcome.row["rejected_score"], outcome.row["margin"]) == (6, 3.5, 2.5)
    assert len({ask.seed for ask in asks}) == 3


@pytest.mark.parametrize(
    ("first", "second", "verified"), [((8, 3), (9, 4), False), ((6, 6), (6, 6), False), ((8, 3), (8, 4), True)]
)
def test_a_row_whose_edit_is_not_preferred_over_both_orders_stays_and_is_marked(prompts, first, second, verified):
    # (8, 3), (9, 4): the teacher takes whichever it sees first
    outcome, _ = drive(cali_work(prompts, verify=True), SCORED, ["<score>6</score>", grades(*first), grades(*second)])
    assert isinstance(outcome, Done) and outcome.row["verified"] is verified


def test_a_row_that_is_filtered_is_not_verified_and_one_without_a_second_opinion_fails(prompts):
    outcome, asks = drive(cali_work(prompts, verify=True), SCORED, ["<score>3</score>"])
    assert isinstance(outcome, Filtered) and "verified" not in outcome.row and len(asks) == 1
    work = cali_work(prompts, verify=True, max_tries=1)
    outcome, _ = drive(work, SCORED, ["<score>6</score>", reply("both fine")])
    assert outcome == Failed("verification: preference strength: no <score_a> in the reply", "both fine")


# ------------------------------------------------------------------------------------------------------------- reports


def test_the_scoring_report_counts_what_was_verified_and_states_the_bias_of_both_kinds_of_grades():
    rows = [
        {"grades_by_order": [(8, 3), (6, 5)], "verified": True, "verify_grades_by_order": [(8, 3), (7, 4)]},
        {"grades_by_order": [(8, 3), (6, 5)], "verified": False, "verify_grades_by_order": [(5, 4), (4, 5)]},
        {"grades_by_order": "mine"},
        {},
    ]
    said = cali.report(rows)
    assert "original pairs with both orders graded: 2; position bias: +2.00 points" in said
    assert "prefers the edit in 1 of 2 rows (50.0%)" in said
    assert "verification: position bias: +1.00 points" in said
    assert cali.report([{}, {"grades_by_order": None}]) == ""


def test_the_bias_is_that_of_the_first_place_whatever_the_order_of_the_pair():
    assert position_bias([(8, 3), (6, 5)]) == 2.0
    assert position_bias([(8, 3), (6, 5), (8, 3), (8, 3)]) == 1.0


@pytest.mark.parametrize("value", [None, [], [[8, 3]], [[8, 3], [8]], [[8, 3], [8, 30]], "8383", [[8, 3], ["8", 3]]])
def test_grades_of_another_form_are_not_read(value):
    assert not usable_grades(value)
    assert usable_grades([[8, 3], (6.5, 5)])
