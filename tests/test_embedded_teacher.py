"""The embedded teacher, measured against the truth of its world on rows it has never seen."""

from __future__ import annotations

import check_teacher
import pytest

pytestmark = pytest.mark.slow

ROWS, SEED = 500, 987


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, float]:
    return check_teacher.check(tmp_path_factory.mktemp("teacher"), ROWS, SEED)


def test_its_own_answers_are_true_where_they_speak_and_sometimes_incomplete(measured):
    assert measured["answers_true"] >= 0.98
    assert 0.6 <= measured["answers_complete"] <= 0.95


def test_its_edits_are_the_gold_edits_towards_its_own_answers(measured):
    assert measured["gold_edits"] >= 0.95


def test_its_edits_keep_most_words_and_make_the_draft_better(measured):
    assert measured["edit_similarity"] > 0.7
    assert measured["edits_raise"] >= 0.95


def test_enough_edits_stay_imperfect_for_margins_to_mean_something(measured):
    assert measured["below_full_marks"] >= 0.2


def test_it_scores_nearly_every_pair_and_ranks_them_by_true_quality(measured):
    assert measured["strength_rows"] >= 0.99
    assert measured["strength_spearman"] >= 0.9
    assert measured["strength_agreement"] >= 0.9


def test_it_scores_edits_of_every_quality_within_a_point_of_the_truth(measured):
    assert measured["calibrated_within_1"] >= 0.9
    assert measured["calibrated_spearman"] >= 0.9


def test_the_margins_of_its_own_edits_are_the_true_ones(measured):
    assert measured["margin_within_1"] >= 0.9
    assert measured["margin_spearman"] >= 0.9
