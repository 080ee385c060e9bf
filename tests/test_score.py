"""Scores: reading grades, averaging orders, the calibration conversation, the closing report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stage_driver import drive, reply

from distiller.engine import AskError
from distiller.manifest import Manifest, hash_file
from distiller.records import BadRow, InputError
from distiller.runner import Done, Failed, Filtered, ParseError
from refine.conversation import parse_refinement
from score import cali_score_vllm as cali
from score import score_orig_vllm as score_orig
from score.candidates import draw_two, join_candidates
from score.conversation import (
    STRENGTH_PROMPT,
    STRENGTH_TAGS,
    both_orders,
    calibration_messages,
    parse_grades,
    parse_score,
    score_text,
    teacher_report,
)

# -------------------------------------------------------------------------------------------------------------- grades


@pytest.mark.parametrize(
    ("inside", "grade"),
    [
        ("7", 7),
        ("1", 1),
        ("10", 10),
        (" 7.5\n", 7.5),
        ("7/10", 7),
        ("8 / 10", 8),
        ("8 out of 10", 8),
        ("10/10", 10),
        ("9.25", 9.25),
    ],
)
def test_a_grade_on_the_scale_is_read(inside, grade):
    assert parse_score(f"I think <score>{inside}</score>.") == grade


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "0",
        "0.5",
        "11",
        "10.1",
        "-3",
        "+7",
        "nan",
        "inf",
        "seven",
        "7,5",
        "4/5",
        "70/100",
        "8/100",
        "7 or 8",
        "7-8",
        "1e1",
        "7.",
        ".5",
        "**7**",
        "٧",
    ],
)
def test_anything_but_one_number_on_the_scale_is_refused(inside):
    with pytest.raises(ParseError):
        parse_score(f"<score>{inside}</score>")


@pytest.mark.parametrize(
    "reply", ["", "7", "Score: 7", "<score>7", "7</score>", "<score_a>7</score_a>", "<Score>7</Score>"]
)
def test_a_number_without_its_tags_is_no_grade(reply):
    with pytest.raises(ParseError):
        parse_score(reply)


def test_the_last_tagged_grade_counts():
    assert parse_score("It claims <score>10</score>, at first sight <score>4</score>; no: <score>6</score>") == 6
    assert parse_score("The grade goes between <score> and so on. <score>6</score>") == 6
    assert parse_grades(
        "<score_b>9</score_b> <score_a>2</score_a> ... <score_a>3</score_a>\n<score_b>5</score_b>", STRENGTH_TAGS
    ) == (3, 5)


@pytest.mark.parametrize("reply", ["<score>3</score> or rather <score>7", "<score>3</score> <score>?</score>"])
def test_a_broken_last_grade_is_not_replaced_by_an_earlier_one(reply):
    with pytest.raises(ParseError):
        parse_score(reply)


@pytest.mark.parametrize("reply", ["<score_a>7</score_a>", "<score_b>7</score_b>", "<score>7</score>"])
def test_strength_needs_both_grades(reply):
    with pytest.raises(ParseError):
        parse_grades(reply, STRENGTH_TAGS)


def test_a_score_is_told_without_idle_zeros():
    assert [score_text(value) for value in (7.0, 7, 6.5, 6.25, 10.0, 19 / 3)] == [
        "7",
        "7",
        "6.5",
        "6.25",
        "10",
        "6.33",
    ]


# -------------------------------------------------------------------------------------------- conversations and report


def test_calibration_continues_the_refinement_conversation():
    refined = "about </refined> and <diagnosis>\n"
    messages = calibration_messages("refine this", "too short", refined, "grade it")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == "refine this" and messages[2]["content"] == "grade it"
    assert parse_refinement(messages[1]["content"]) == ("too short", refined)


def test_both_orders_average_to_one_score_each():
    assert both_orders([(8.0, 3.0), (6.0, 4.0)]) == (7.0, 3.5)


def _row(first, second):
    chosen_score, rejected_score = both_orders([first, second])
    return {"chosen_score": chosen_score, "rejected_score": rejected_score, "grades_by_order": [first, second]}


def test_the_report_finds_a_teacher_that_favours_the_first_place():
    # the first place is worth 2 points: chosen 8 when first, 6 when second; rejected 5 when first, 3 when second
    report = teacher_report([_row((8, 3), (6, 5)), _row((8, 3), (6, 5))])
    assert report["position_bias"] == 2.0
    assert report["agreement"] == 1.0 and report["mean_margin"] == 3.0


def test_the_report_leaves_ties_out_of_the_agreement():
    report = teacher_report([_row((8, 3), (8, 3)), _row((2, 9), (2, 9)), _row((5, 5), (5, 5)), _row((6, 4), (7, 4))])
    assert (report["pairs"], report["ties"]) == (4, 1)
    assert report["agreement"] == pytest.approx(2 / 3)


def test_the_report_of_nothing_has_no_numbers():
    assert teacher_report([]) == {"pairs": 0, "agreement": None, "ties": 0, "position_bias": None, "mean_margin": None}


# --------------------------------------------------------------------------------------------------- the stages, a row

ROW = {"id": "r1", "prompt": "Who?", "chosen": "Armstrong.", "rejected": "It was Aldrin, in 1969.", "mark": [1]}
REFINED = {
    "teacher_response": "Neil Armstrong.",
    "diagnosis": "Wrong man.",
    "refined_response": "It was Armstrong, in 1969.",
    "edit_similarity": 0.8,
}


def grades(a, b) -> str:
    return f"<score_a>{a}</score_a> <score_b>{b}</score_b>"


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


def test_a_pair_is_graded_in_both_orders_and_averaged(prompts):
    outcome, asks = drive(orig_work(prompts), ROW, [grades(8, 3), grades(5, 7)])
    first, second = (ask.messages[0]["content"] for ask in asks)
    assert first == "Who?|A Armstrong.|B It was Aldrin, in 1969."
    assert second == "Who?|A It was Aldrin, in 1969.|B Armstrong."
    scores = {"chosen_score": 7.5, "rejected_score": 4.0, "grades_by_order": [(8, 3), (7, 5)]}
    assert outcome == Done({**ROW, **scores})


def test_unusable_grades_are_asked_again_and_then_fail_without_a_default(prompts):
    outcome, asks = drive(orig_work(prompts), ROW, [grades(8, 11), grades(8, 3), grades(5, 7)])
    assert isinstance(outcome, Done) and asks[0].seed != asks[1].seed
    outcome, _ = drive(orig_work(prompts, max_tries=2), ROW, [grades(8, 3), "both fine", "both fine!"])
    assert outcome == Failed("preference strength: no <score_a> in the reply", "both fine!")
    outcome, _ = drive(orig_work(prompts), ROW, [AskError("too long")])
    assert outcome == Failed("preference strength: too long", None)


def test_a_cut_reply_counts_only_if_its_grades_are_whole(prompts):
    outcome, _ = drive(orig_work(prompts), ROW, [reply(grades(8, 3) + " since", "length"), grades(5, 7)])
    assert isinstance(outcome, Done)
    cut = reply("<score_a>8</score_a> <score_b>3", "length")
    outcome, _ = drive(orig_work(prompts, max_tries=1), ROW, [cut])
    assert isinstance(outcome, Failed)
    thinking = replace(reply("", "length"), reasoning="<score_a>8</score_a> <score_b>3</score_b> or")
    outcome, _ = drive(orig_work(prompts, max_tries=1), ROW, [thinking])
    assert "cut the reply, maybe inside its thinking" in outcome.reason and outcome.raw == thinking.reasoning


def test_ties_are_kept_dropped_or_regraded(prompts):
    tie = [grades(8, 6), grades(8, 6)]
    assert isinstance(drive(orig_work(prompts), ROW, tie)[0], Done)
    outcome, _ = drive(orig_work(prompts, ties="drop"), ROW, tie)
    assert outcome.reason == "tie" and outcome.row["chosen_score"] == 7
    outcome, asks = drive(orig_work(prompts, ties="regrade"), ROW, [*tie, grades(9, 6), grades(8, 7)])
    assert (outcome.row["chosen_score"], outcome.row["rejected_score"]) == (7.5, 7.0)
    assert len({ask.seed for ask in asks}) == 4
    outcome, _ = drive(orig_work(prompts, ties="regrade", max_tries=2), ROW, tie * 2)
    assert isinstance(outcome, Filtered) and outcome.reason == "tie"


CANDIDATES = [
    {"response": "one", "model": "m1"},
    {"response": "two", "model": "m2"},
    {"response": "two ", "model": "m3"},
]


def test_the_scores_decide_which_of_two_drawn_answers_is_chosen(prompts):
    row = {"id": "p1", "prompt": "Who?", "mark": 1, "candidates": CANDIDATES}
    work = orig_work(prompts, responses=["a.jsonl"])
    for a, b in [(grades(8, 3), grades(5, 7)), (grades(3, 8), grades(7, 5))]:
        outcome, asks = drive(work, row, [a, b])
        shown_first = asks[0].messages[0]["content"].split("|A ")[1].split("|B ")[0]
        better = shown_first if a == grades(8, 3) else ({"one", "two"} - {shown_first}).pop()
        models = {"one": "m1", "two": "m2"}
        pair = {"chosen": better, "rejected": ({"one", "two"} - {better}).pop()}
        pair |= {"chosen_model": models[pair["chosen"]], "rejected_model": models[pair["rejected"]]}
        scores = {"chosen_score": 7.5, "rejected_score": 4.0}
        # chosen shown first comes first: 8 and 3 where it was drawn first, 7 and 5 where it was drawn second
        by_order = [(8, 3), (7, 5)] if better == shown_first else [(7, 5), (8, 3)]
        assert outcome == Done(
            {"id": "p1", "prompt": "Who?", "mark": 1, "chosen_by": "teacher", **pair, **scores}
            | {"grades_by_order": by_order}
        )


def test_a_prompt_without_two_different_answers_or_with_a_tie_makes_no_pair(prompts):
    work = orig_work(prompts, responses=["a.jsonl"])
    outcome, asks = drive(work, {"id": "p1", "prompt": "Who?", "candidates": CANDIDATES[1:]}, [])
    assert outcome.reason == "fewer than two different answers" and not asks
    row = {"id": "p1", "prompt": "Who?", "candidates": CANDIDATES}
    outcome, _ = drive(work, row, [grades(5, 5), grades(5, 5)])
    assert outcome.reason == "tie"


def test_two_answers_are_drawn_by_seed_and_id_alone_and_evenly():
    candidates = [{"response": text, "model": None} for text in "abcd"]
    drawn = [tuple(c["response"] for c in draw_two(candidates, 0, str(n))) for n in range(1200)]
    again = [tuple(c["response"] for c in draw_two(candidates[::-1], 0, str(n))) for n in range(1200)]
    assert drawn == again
    assert len(set(drawn)) == 12 and min(drawn.count(pair) for pair in set(drawn)) > 60
    assert drawn != [tuple(c["response"] for c in draw_two(candidates, 1, str(n))) for n in range(1200)]


def _write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_candidates_are_joined_by_id_and_every_id_is_accounted_for(tmp_path, capsys):
    def answer(key, response, prompt=None):
        return {
            "id": key,
            "prompt": prompt or f"prompt {key}",
            "response": response,
            "model": response[0],
            "mark": key,
        }

    one = _write(tmp_path / "1.jsonl", [answer("a", "1a"), answer("b", "1b"), answer("c", "1c"), "{broken"])
    two_rows = [answer("c", "2c", "another prompt"), answer("b", "2b"), {"id": "d", "prompt": "d"}, answer("a", "2a")]
    two = _write(tmp_path / "2.jsonl", two_rows)
    a, b, c, broken, d = join_candidates([one, two])
    assert a == {
        "id": "a",
        "prompt": "prompt a",
        "mark": "a",
        "candidates": [{"response": "1a", "model": "1"}, {"response": "2a", "model": "2"}],
    }
    assert [candidate["response"] for candidate in b["candidates"]] == ["1b", "2b"]
    assert isinstance(c, BadRow) and c.id == "c" and "another prompt" in c.reason
    assert isinstance(broken, BadRow) and broken.id == f"{one}:line-4"
    assert isinstance(d, BadRow) and d.id == "d" and "response" in d.reason
    assert "2 lines" in capsys.readouterr().err
    assert join_candidates([one, two], limit=1) == [a]


def test_the_margin_is_the_refined_score_minus_the_rejected_one(prompts):
    row = {**ROW, **REFINED, "chosen_score": 9.0, "rejected_score": 3.5}
    outcome, asks = drive(cali_work(prompts), row, ["Better. <score>6</score>"])
    question = [message["content"] for message in asks[0].messages]
    assert question[0] == "Who?|It was Aldrin, in 1969.|Neil Armstrong."
    assert parse_refinement(question[1]) == ("Wrong man.", "It was Armstrong, in 1969.")
    assert question[2] == "It got 3.5."
    assert outcome == Done(
        {
            **ROW,
            "teacher_response": "Neil Armstrong.",
            "diagnosis": "Wrong man.",
            "edit_similarity": 0.8,
            "chosen": "It was Armstrong, in 1969.",
            "chosen_score": 6.0,
            "rejected_score": 3.5,
            "margin": 2.5,
            "original_chosen": "Armstrong.",
            "original_chosen_score": 9.0,
        }
    )


def test_a_missing_rejected_score_comes_from_the_original_pair_in_both_orders(prompts):
    outcome, asks = drive(cali_work(prompts), {**ROW, **REFINED}, [grades(8, 3), grades(4, 7), "<score>6</score>"])
    assert asks[0].messages[0]["content"] == "Who?|A Armstrong.|B It was Aldrin, in 1969."
    assert asks[2].messages[2]["content"] == "It got 3.5."
    assert len({ask.seed for ask in asks}) == 3
    assert (outcome.row["original_chosen_score"], outcome.row["rejected_score"]) == (7.5, 3.5)
    assert outcome.row["margin"] == 2.5


def test_a_known_rejected_score_needs_no_chosen_score(prompts):
    outcome, _ = drive(cali_work(prompts), {**ROW, **REFINED, "rejected_score": 3}, ["<score>6</score>"])
    assert "original_chosen_score" not in outcome.row and outcome.row["chosen_score"] == 6


@pytest.mark.parametrize(
    ("grade", "min_margin", "kept"), [(4, 0, False), (3, 0, False), (4.5, 0, True), (5, 1, False)]
)
def test_a_margin_not_over_the_least_is_filtered(prompts, grade, min_margin, kept):
    row = {**ROW, **REFINED, "rejected_score": 4}
    outcome, _ = drive(cali_work(prompts, min_margin=float(min_margin)), row, [f"<score>{grade}</score>"])
    assert isinstance(outcome, Done if kept else Filtered)
    assert outcome.row["margin"] == grade - 4


def test_conversational_rows_stay_conversational_on_both_sides(prompts):
    def message(text):
        return [{"role": "assistant", "content": text}]

    prompt = [{"role": "user", "content": "Who?"}]
    row = {**ROW, **REFINED, "prompt": prompt, "chosen": message("Armstrong."), "rejected": message(ROW["rejected"])}
    outcome, _ = drive(cali_work(prompts), {**row, "rejected_score": 4}, ["<score>6</score>"])
    assert outcome.row["chosen"] == message("It was Armstrong, in 1969.")
    assert outcome.row["rejected"] == message(ROW["rejected"]) and outcome.row["prompt"] == prompt
    assert outcome.row["original_chosen"] == message("Armstrong.")


def test_mean_mode_averages_samples_of_different_seeds(prompts):
    row = {**ROW, **REFINED, "rejected_score": 4}
    work = cali_work(prompts, score_mode="mean", num_score_samples=3)
    outcome, asks = drive(work, row, ["<score>6</score>", "no", "<score>7</score>", "<score>9</score>"])
    assert outcome.row["chosen_score"] == pytest.approx(22 / 3)
    assert len({ask.seed for ask in asks}) == 4 and all(ask.messages == asks[0].messages for ask in asks)
    work = cali_work(prompts, score_mode="mean", num_score_samples=2, max_tries=1)
    outcome, _ = drive(work, row, ["<score>6</score>", "no"])
    assert outcome == Failed("calibrated score: no <score> in the reply", "no")


def test_another_refinement_prompt_than_stage_1_used_is_refused(prompts, tmp_path, capsys):
    used = hash_file(prompts["refine"])
    identity = {"stage": "refine", "model": "teacher", "prompts": {"prompt_file": [used]}}
    Manifest(identity).save(tmp_path / "refined.jsonl.manifest.json")
    args = cali.CaliScoreArguments(
        input=str(tmp_path / "refined.jsonl"), model="teacher", refine_prompt_file=prompts["refine"]
    )
    cali.check_refinement(args)
    assert capsys.readouterr().err == ""
    args.model = "another"
    cali.check_refinement(args)
    assert "refined by teacher and is scored by another" in capsys.readouterr().err
    args.refine_prompt_file = prompts["strength"]
    with pytest.raises(InputError, match="--refine_prompt_file"):
        cali.check_refinement(args)
    args.input = str(tmp_path / "elsewhere.jsonl")
    cali.check_refinement(args)


def test_the_shipped_prompts_show_what_they_are_given_and_ask_for_their_tags(prompts):
    _, asks = drive(score_orig.make_work(score_orig.ScoreOrigArguments()), ROW, [grades(8, 3), grades(5, 7)])
    text = asks[0].messages[0]["content"]
    assert text.index("Who?") < text.index("Armstrong.") < text.index("It was Aldrin")
    assert "<score_a>" in text and "<score_b>" in text
    row = {**ROW, **REFINED, "rejected_score": 3.5}
    _, asks = drive(cali.make_work(cali.CaliScoreArguments()), row, ["<score>6</score>"])
    assert "was given 3.5" in asks[0].messages[2]["content"] and "<score>" in asks[0].messages[2]["content"]


def test_a_reply_that_echoes_the_shipped_form_is_no_grade():
    text = Path(STRENGTH_PROMPT).read_text()
    with pytest.raises(ParseError):
        parse_grades(text, STRENGTH_TAGS)
