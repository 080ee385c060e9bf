"""Best-of-n: what a reward model is worth for choosing among responses."""

import json
import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
from eval_fixtures import save_reward_model, write_jsonl

from distiller.engine import AskError, Completion
from distiller.records import InputError
from distiller.runner import Done, Failed, Filtered
from refine import generate_response_vllm as generate
from RewardTrainer.eval.best_of_n import BestOfNArguments, best_of, figures, pick_probabilities, run, sizes

REWARDS = [[0.5, 2.0, -1.0, 2.0, 0.5, 3.5], [1.0] * 6, [3.0, 2.0, 1.0, 0.0, -1.0, -2.0]]
GOLD = [[1.0, 0.0, 5.0, 4.0, 2.0, 0.5], [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]


def enumerated(rewards: list[float], gold: list[float], n: int) -> float:
    """Mean over every choice of n responses, of the mean gold of the best rewarded among them."""
    picks = []
    for chosen in combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in chosen)
        picks.append(mean(gold[i] for i in chosen if rewards[i] == best))
    return mean(picks)


@pytest.mark.parametrize("n", range(1, 7))
def test_the_figure_for_n_is_the_mean_over_every_choice_of_n(n):
    expected = [enumerated(rewards, gold, n) for rewards, gold in zip(REWARDS, GOLD, strict=True)]
    np.testing.assert_allclose(best_of(REWARDS, GOLD, n), expected, atol=1e-12)
    for rewards in REWARDS:
        assert pick_probabilities(rewards, n).sum() == pytest.approx(1)


def test_the_table_runs_from_a_random_pick_to_the_best_of_all():
    table = figures(REWARDS, GOLD)
    assert [row["n"] for row in table] == [1, 2, 4, 6]
    first, last = table[0], table[-1]
    assert first["gold"] == first["random"] == first["oracle"] == pytest.approx(mean(map(mean, GOLD)))
    assert last["oracle"] == pytest.approx(mean(map(max, GOLD)))
    assert last["reward"] == pytest.approx(mean(map(max, REWARDS)))
    assert last["gold"] == pytest.approx(mean([0.5, mean(GOLD[1]), 0.0]))
    assert last["kl"] == pytest.approx(math.log(6) - 5 / 6) and first["kl"] == 0
    for row in table:
        assert row["gold_interval"][0] <= row["gold"] <= row["gold_interval"][1]
    assert [row["reward"] for row in table] == sorted(row["reward"] for row in table)


def test_a_reward_that_is_the_gold_is_its_own_oracle_and_its_opposite_the_worst():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(40, 16)).tolist()
    for row in figures(gold, gold):
        assert row["gold"] == row["oracle"] == row["reward"]
    opposite = figures([[-value for value in values] for values in gold], gold)
    assert opposite[-1]["gold"] == pytest.approx(mean(map(min, gold)))
    assert [row["gold"] for row in opposite] == sorted((row["gold"] for row in opposite), reverse=True)


def test_sizes_double_and_end_with_all():
    assert sizes(1) == [1] and sizes(8) == [1, 2, 4, 8] and sizes(12) == [1, 2, 4, 8, 12]


def test_rows_are_rewarded_judged_and_written_once(tmp_path, capsys):
    model = save_reward_model(tmp_path / "rm")
    adapter = tmp_path / "gold.py"
    adapter.write_text(
        "def load(model, device):\n    return None\n\n\n"
        "def score(loaded, conversations):\n    return [c[-1]['content'].count('tin') for c in conversations]\n"
    )
    rows = [{"id": f"r{n}", "prompt": f"q{n}", "responses": ["tin", "red tin tin", "red"]} for n in range(3)]
    rows[1]["responses"].pop()
    rows.append({"id": "longer", "prompt": "q", "responses": ["tin", "red", "red tin tin", "red red"]})
    rows.append({"id": "none", "prompt": "q", "responses": []})
    source = write_jsonl(tmp_path / "candidates.jsonl", rows)
    arguments = BestOfNArguments(
        model=str(model), input=str(source), gold_adapter=str(adapter), output_dir=str(tmp_path / "out")
    )
    results = run(arguments)
    assert results["counts"] == {"prompts": 3, "left_out": 2, "failed": 1, "responses": 3}
    assert [row["n"] for row in results["best_of_n"]] == [1, 2, 3]
    assert results["best_of_n"][0]["gold"] == pytest.approx(mean([1, 1, 3 / 4]))
    assert results["best_of_n"][-1]["oracle"] == pytest.approx(mean([2, 2, mean([2, 2, 2, 1])]))
    rewards = [json.loads(line)["rewards"] for line in (tmp_path / "out/rewards.jsonl").read_text().splitlines()]
    whole = [enumerated(row, row, 3) for row in rewards if len(row) >= 3]
    assert results["best_of_n"][-1]["reward"] == pytest.approx(mean(whole))
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert ElementTree.fromstring((tmp_path / "out/curve.svg").read_text()).tag.endswith("svg")
    assert "left out" in capsys.readouterr().out
    assert run(arguments) == results  # what is rewarded already is not asked for again


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "m"}, "--input is needed"),
        ({"model": "m", "input": "i"}, "--gold_model or --gold_adapter"),
        ({"model": "m", "input": "i", "gold_model": "g", "gold_adapter": "a.py"}, "one of them"),
    ],
)
def test_what_is_missing_is_named(given, message):
    with pytest.raises(InputError, match=message):
        run(BestOfNArguments(**given))


def test_rows_without_responses_are_refused_before_a_model_loads(tmp_path):
    source = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "tin", "rejected": "red"}])
    with pytest.raises(InputError, match=r"no row has `responses`.*generate_response_vllm.py --num_responses"):
        run(BestOfNArguments(model=str(tmp_path / "none"), input=str(source), gold_model=str(tmp_path / "none")))


def drive(work, row: dict, replies: list) -> tuple[object, list]:
    """(outcome of the row, its asks)"""
    generator, asks, reply = work(row), [], None
    replies = iter(replies)
    while True:
        try:
            asks.append(generator.send(reply))
        except StopIteration as end:
            return end.value, asks
        reply = next(replies)


def said(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(text, None, finish_reason, 1, 1, None)


def test_several_responses_are_drawn_with_seeds_of_their_own_and_whole_ones_kept():
    work = generate.make_work(generate.GenerateArguments(model="tiny", num_responses=3))
    row = {"id": "a", "prompt": "Why?"}
    outcome, asks = drive(work, row, [said("one"), said("cut", "length"), said("two")])
    assert outcome == Done({**row, "responses": ["one", "two"], "model": "tiny"})
    assert len({ask.seed for ask in asks}) == 3
    outcome, _ = drive(work, row, [said("cut", "length")] * 3)
    assert isinstance(outcome, Filtered) and "cut by max_tokens" in outcome.reason
    outcome, _ = drive(work, row, [said("one"), AskError("too long")])
    assert outcome == Failed("too long")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_responses": 0}, "num_responses 0 is out of range"),
        ({"num_responses": 2, "as_teacher_response": True}, "exclude each other"),
        ({"num_responses": 2, "temperature": 0}, "the same answer"),
    ],
)
def test_several_responses_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        generate.GenerateArguments(input="i", output="o", model="m", **flags).validate()
