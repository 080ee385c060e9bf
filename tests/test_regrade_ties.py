"""Regrading: ties are asked again and averaged, dropped if they stay; everything else passes through."""

from __future__ import annotations

import re

import pytest
from stage_driver import drive

from distiller.manifest import Manifest
from distiller.records import InputError
from distiller.runner import Done, Failed, Filtered
from refine import filter_pairs
from score import cali_score_vllm as cali
from score import regrade_ties as regrade
from score import score_orig_vllm as score_orig

TIED = {
    "id": "r1",
    "prompt": "Who?",
    "chosen": "Armstrong.",
    "rejected": "Aldrin.",
    "chosen_score": 6.0,
    "rejected_score": 6.0,
    "grades_by_order": [[7, 5], [5, 7]],
    "mark": 1,
}
DECIDED = TIED | {"chosen_score": 7.0, "grades_by_order": [[7, 6], [7, 6]]}


def grades(a, b) -> str:
    return f"<score_a>{a}</score_a> <score_b>{b}</score_b>"


@pytest.fixture
def prompt(tmp_path) -> str:
    path = tmp_path / "strength.txt"
    path.write_text("{{ prompt }}|A {{ response_a }}|B {{ response_b }}")
    return str(path)


def work(prompt, **values):
    return regrade.make_work(regrade.RegradeArguments(prompt_file=prompt, **values))


def test_a_row_that_is_no_tie_passes_through_unchanged_and_unasked(prompt):
    outcome, asks = drive(work(prompt), DECIDED, [])
    assert outcome == Done(DECIDED) and not asks


def test_a_tie_is_graded_in_further_turns_and_all_its_grades_count(prompt):
    replies = [grades(8, 5), grades(6, 6), grades(7, 6), grades(5, 7)]
    outcome, asks = drive(work(prompt, turns=2), TIED, replies)
    assert outcome.row["grades_by_order"] == [[7, 5], [5, 7], (8, 5), (6, 6), (7, 6), (7, 5)]
    assert outcome.row["chosen_score"] == pytest.approx(40 / 6)
    assert outcome.row["rejected_score"] == pytest.approx(34 / 6)
    assert isinstance(outcome, Done) and outcome.row["chosen"] == "Armstrong." and outcome.row["mark"] == 1
    assert [ask.messages[0]["content"] for ask in asks] == [
        "Who?|A Armstrong.|B Aldrin.",
        "Who?|A Aldrin.|B Armstrong.",
    ] * 2


def test_no_seed_of_the_scoring_comes_again(prompt):
    scoring = score_orig.make_work(score_orig.ScoreOrigArguments(prompt_file=prompt))
    _, before = drive(scoring, TIED, [grades(7, 5), grades(7, 5)])
    _, again = drive(work(prompt, turns=3), TIED, [grades(8, 5)] * 6)
    assert len({ask.seed for ask in before + again}) == 8


def test_what_is_still_a_tie_is_dropped_or_kept(prompt):
    same = [grades(6, 6)] * 2
    outcome, _ = drive(work(prompt, turns=1), TIED, same)
    assert isinstance(outcome, Filtered) and outcome.reason == "tie" and len(outcome.row["grades_by_order"]) == 4
    assert isinstance(drive(work(prompt, turns=1, ties="keep"), TIED, same)[0], Done)


def test_scores_within_the_tolerance_are_a_tie_before_and_after(prompt):
    row = TIED | {"chosen_score": 6.5}
    assert drive(work(prompt), row, [])[0] == Done(row)
    row = row | {"grades_by_order": [[7, 5], [6, 7]]}
    outcome, _ = drive(work(prompt, tie_tolerance=0.5, turns=1), row, [grades(6, 6)] * 2)
    assert isinstance(outcome, Filtered)  # 6.25 and 6
    outcome, _ = drive(work(prompt, tie_tolerance=0.5, turns=1), row, [grades(9, 3), grades(3, 9)])
    assert isinstance(outcome, Done) and outcome.row["chosen_score"] == 7.75


def test_scores_that_decide_which_response_is_chosen_exchange_the_two_and_a_label_never_changes(prompt):
    against = [grades(4, 8), grades(8, 4)]
    outcome, _ = drive(work(prompt, turns=1), TIED, against)
    assert outcome.row["chosen"] == "Armstrong." and outcome.row["chosen_score"] == 5.0
    made = TIED | {"chosen_by": "teacher", "chosen_model": "m1", "rejected_model": "m2"}
    outcome, _ = drive(work(prompt, turns=1), made, against)
    row = outcome.row
    assert (row["chosen"], row["chosen_model"], row["chosen_score"]) == ("Aldrin.", "m2", 7.0)
    assert (row["rejected"], row["rejected_model"], row["rejected_score"]) == ("Armstrong.", "m1", 5.0)
    # The order with chosen, now Aldrin, shown first comes first again.
    assert row["grades_by_order"] == [(8.0, 4.0), (8.0, 4.0), (7, 5), (5, 7)]


def test_grades_that_cannot_be_had_or_read_fail_the_row(prompt):
    outcome, _ = drive(work(prompt, max_tries=1), TIED, ["both fine"])
    assert outcome == Failed("preference strength: no <score_a> in the reply", "both fine")
    outcome, asks = drive(work(prompt), TIED | {"grades_by_order": [[7, 5]]}, [])
    assert isinstance(outcome, Failed) and "grades_by_order" in outcome.reason and not asks


def test_an_edit_is_not_graded_together_with_the_response_it_replaced(prompt):
    for row in (TIED, DECIDED):
        outcome, asks = drive(work(prompt), row | {"original_chosen": "Aldrin?", "margin": 0.0}, [])
        assert isinstance(outcome, Failed) and "only original pairs" in outcome.reason and not asks


def test_the_report_counts_ties_of_the_input_and_what_is_left_of_them(prompt):
    before = [TIED | {"id": str(n)} for n in range(4)] + [DECIDED | {"id": "d"}]
    after = [DECIDED | {"id": "0"}, DECIDED | {"id": "d"}, TIED | {"id": "1"}, TIED | {"id": "2"}]  # 3 has failed
    said = regrade.report(regrade.RegradeArguments(prompt_file=prompt), before, after)
    assert said == "ties: 3 regraded, 1 of them no ties any more, 2 dropped"


def test_grades_of_another_prompt_or_mode_are_not_averaged_with_those_there_are(prompt, tmp_path, capsys):
    source = str(tmp_path / "scored.jsonl")
    args = regrade.RegradeArguments(input=source, output="o.jsonl", model="teacher", prompt_file=prompt)
    regrade.check_scoring(args)  # no manifest
    used = score_orig.ScoreOrigArguments(input=source, output="o.jsonl", model="teacher", prompt_file=prompt)
    identity = used.identity("score_orig", {source: "0"})
    Manifest(identity).save(tmp_path / "scored.jsonl.manifest.json")
    regrade.check_scoring(args)
    assert capsys.readouterr().err == ""
    args.model = "another"
    regrade.check_scoring(args)
    assert "scored by teacher and is regraded by another" in capsys.readouterr().err
    args.score_mode = "expected"
    with pytest.raises(InputError, match="--score_mode sample, not expected"):
        regrade.check_scoring(args)
    other = tmp_path / "other.txt"
    other.write_text("{{ prompt }}{{ response_a }}{{ response_b }}")
    args.score_mode, args.prompt_file = "sample", str(other)
    with pytest.raises(InputError, match="--prompt_file"):
        regrade.check_scoring(args)


@pytest.mark.parametrize("text", ['{"stage": "refi', '{"another": "tool"}', "[]"])
def test_a_damaged_manifest_beside_the_input_is_named_with_what_helps(prompt, tmp_path, capsys, text):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    manifest = tmp_path / "rows.jsonl.manifest.json"
    manifest.write_text(text)
    given = {"input": str(source), "output": str(tmp_path / "o.jsonl"), "model": "teacher"}
    helps = rf"{re.escape(str(manifest))} is no manifest of ours, or damaged .*: put the file back, or take it away"
    with pytest.raises(InputError, match=helps):
        regrade.check_scoring(regrade.RegradeArguments(**given))
    with pytest.raises(InputError, match=helps):
        cali.check_refinement(cali.CaliScoreArguments(**given))
    assert filter_pairs.main(["--input", given["input"], "--output", given["output"]]) == 1
    assert re.search(helps, capsys.readouterr().err)
    manifest.unlink()
    assert filter_pairs.main(["--input", given["input"], "--output", given["output"]]) == 0
