"""Score modes, verification, ties and reports through the real commands, runner and files; the LLM is a function."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from test_stages import ROOT, Teacher, _flags, _read, _write, place  # noqa: F401 - place is a fixture

from distiller.engine import AskError, Completion
from refine import refine_response_vllm as refine
from score import cali_score_vllm as cali
from score import regrade_ties as regrade
from score import score_orig_vllm as score_orig


class Weighing(Teacher):
    """Also says how probable each grade is: three quarters for the one it gave, a quarter for the next lower one.
    Refuses prompts with `refused` in them, finds the edit of `after 17` no better, and grades `same way` by chance."""

    refused = "after 99"

    def collect(self):
        waiting, self.asks = self.asks, []
        return [(key, self.complete(ask)) for key, ask in waiting]

    def complete(self, ask):
        if self.refused in ask.messages[0]["content"]:
            return AskError("too long")
        text = self.say(ask)
        if ask.choices:
            given = round(float(text.removeprefix(ask.choices.prefill).removesuffix(ask.choices.rest)))
            weights = {given: 0.75, given - 1: 0.25}
            logprobs = tuple(math.log(weights.get(score, 1e-15)) for score in range(1, 11))
            return Completion("", None, "stop", 1, 1, logprobs)
        return Completion(text, None, "stop", 1, 1, None)

    def say(self, ask) -> str:
        text = ask.messages[0]["content"]
        if "RESPONSE A" in text and "same way" in text:
            return f"<score_a>{5 + ask.seed % 3}</score_a><score_b>5</score_b>"
        if "RESPONSE A" in text and "after 17" in text:
            return "<score_a>6</score_a><score_b>5</score_b>"
        return self.answer(ask)


@pytest.fixture
def stages(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr("distiller.cli.make_engine", lambda args: Weighing())
    assert refine.main(_flags("refine", "pairs.jsonl", "refined.jsonl")) == 0
    return place


def by_id(path: str) -> dict[str, dict]:
    return {row["id"]: row for row in _read(path)}


def test_the_report_is_also_printed_where_too_many_rows_failed_and_never_where_the_run_is_refused(
    stages, capsys, monkeypatch
):
    monkeypatch.setattr(Weighing, "refused", "after 13")
    flags = _flags("score", "pairs.jsonl", "scored.jsonl", "orig", "--max_failure_rate", "0")
    assert score_orig.main(flags) == 1
    said = capsys.readouterr().err
    assert "of the rows failed" in said and "of 7 scored pairs" in said and "position bias: +1.00 points" in said
    assert score_orig.main([*flags, "--seed", "7"]) == 1
    assert "position bias" not in capsys.readouterr().err


def test_verify_marks_the_rows_and_counts_them_at_the_end(stages, capsys):
    assert cali.main([*_flags("score", "refined.jsonl", "scored.jsonl"), "--verify", "true"]) == 0
    said = capsys.readouterr().err
    rows = by_id("scored.jsonl")
    assert {identifier for identifier, row in rows.items() if not row["verified"]} == {"n17"}
    assert rows["n17"]["verify_grades_by_order"] == [[6.0, 5.0], [5.0, 6.0]]
    assert rows["n13"]["verify_grades_by_order"] == [[9.0, 3.0], [8.0, 4.0]]
    assert "prefers the edit in 7 of 8 rows (87.5%)" in said
    assert "verification: position bias: +1.00 points" in said and "original pairs" in said
    assert cali.main(_flags("score", "refined.jsonl", "scored.jsonl")) == 1  # rows with and without would mix
    assert "verify" in capsys.readouterr().err


def test_both_stages_in_one_engine_verify_and_report_alike(stages, capsys):
    config = yaml.safe_load((ROOT / "score/configs/paper.yaml").read_text())
    config |= {name: str(ROOT / path) for name, path in config.items() if name.endswith("prompt_file")}
    Path("score.yaml").write_text(yaml.safe_dump(config | {"verify": True, "score_mode": "expected"}))
    flags = _flags("refine", "pairs.jsonl", "both.jsonl", "--then_score", "--score_config", "score.yaml")
    assert refine.main(flags) == 0
    assert "prefers the edit in 7 of 8 rows" in capsys.readouterr().err
    mode = ["--verify", "true", "--score_mode", "expected"]
    assert cali.main([*_flags("score", "refined.jsonl", "scored.jsonl"), *mode]) == 0
    assert by_id("both.jsonl") == by_id("scored.jsonl")
    # given: 9 and 3 with chosen first, 4 and 8 with rejected first; each less a quarter point
    assert by_id("scored.jsonl")["n13"]["grades_by_order"][0] == pytest.approx([8.75, 2.75])
    assert by_id("scored.jsonl")["n13"]["rejected_score"] == pytest.approx(3.25)


@pytest.mark.parametrize("mode", ["sample", "mean", "expected"])
def test_a_dry_run_counts_every_ask_of_the_run(stages, capsys, mode):
    mode = ["--score_mode", mode, "--num_score_samples", "2"]
    server = ["--base_url", "http://127.0.0.1:9/v1", "--model", "no/such-model", "--max_tokens", "10"]
    for main, flags in (
        (cali.main, _flags("score", "refined.jsonl", "scored.jsonl")),
        (score_orig.main, _flags("score", "refined.jsonl", "orig.jsonl", "orig")),
        (regrade.main, [*_flags("score", "orig.jsonl", "new.jsonl", "orig"), "--tie_tolerance", "9"]),
    ):
        assert main([*flags, *mode]) == 0
        asks = json.loads(Path(f"{flags[flags.index('--output') + 1]}.manifest.json").read_text())["usage"]["asks"]
        capsys.readouterr()
        assert main([*flags, *mode, *server, "--dry_run", "--price_per_million", "0", "1e6"]) == 0
        said = capsys.readouterr().out
        assert f"asks: {asks}, " in said
        replies = int(re.search(r"at most ([\d,]+) \(max_tokens 10", said)[1].replace(",", "")) // 10
        requests = 11 * (asks - replies)
        assert (f"requests for probabilities: {requests:,}, " in said) == (mode[1] == "expected")
        assert f"cost: at most {10 * replies + requests:,.4g} at" in said


def test_ties_of_candidates_are_kept_if_asked_for_and_regraded_into_pairs(stages, capsys):
    prompts = [{"id": f"t{n}", "prompt": f"Say {n} the same way, after {n}"} for n in range(40)]
    for model in ("m1", "m2"):
        _write(stages / f"{model}.jsonl", [{**row, "response": f"by {model}", "model": model} for row in prompts])
    flags = _flags("score", "unread", "new.jsonl", "orig", "--responses", "m1.jsonl", "m2.jsonl")
    assert score_orig.main(flags) == 0
    dropped = {row["id"] for row in _read("new.jsonl.filtered.jsonl")}
    assert 0 < len(dropped) < 40 and len(_read("new.jsonl")) == 40 - len(dropped)
    kept = [*_flags("score", "unread", "kept.jsonl", "orig", "--responses", "m1.jsonl", "m2.jsonl"), "--ties", "keep"]
    assert score_orig.main(kept) == 0
    before = by_id("kept.jsonl")
    assert {key for key, row in before.items() if row["chosen_score"] == row["rejected_score"]} == dropped
    capsys.readouterr()

    flags = ["--config", str(ROOT / "score/configs/ties_paper.yaml"), "--input", "kept.jsonl", "--turns", "2"]
    flags += ["--output", "regraded.jsonl", "--prompt_file", str(ROOT / "score/prompts/strength.txt")]
    assert regrade.main(flags) == 0
    after, still = by_id("regraded.jsonl"), by_id("regraded.jsonl.filtered.jsonl")
    said = capsys.readouterr().err
    assert f"{len(dropped)} regraded, {len(dropped) - len(still)} of them no ties" in said
    assert set(after) | set(still) == set(before) and set(still) < dropped
    assert all(after[key] == row for key, row in before.items() if key not in dropped)
    for key in dropped - set(still):
        row = after[key]
        assert row["chosen_score"] > row["rejected_score"] and len(row["grades_by_order"]) == 6
        assert row["chosen"] == f"by {row['chosen_model']}" != row["rejected"]
        chosen, rejected = (sum(pair[side] for pair in row["grades_by_order"]) / 6 for side in (0, 1))
        assert (row["chosen_score"], row["rejected_score"]) == pytest.approx((chosen, rejected))
    assert any(after[key]["chosen"] != before[key]["chosen"] for key in dropped - set(still))


def test_a_file_without_the_grades_behind_its_scores_is_refused_with_the_command_that_makes_them(stages, capsys):
    rows = [{**row, "chosen_score": 5, "rejected_score": 5} for row in _read("pairs.jsonl")]
    Path("rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config", str(ROOT / "score/configs/ties_paper.yaml"), "--input", "rated.jsonl", "--output", "o.jsonl"]
    assert regrade.main([*flags, "--prompt_file", str(ROOT / "score/prompts/strength.txt")]) == 1
    said = capsys.readouterr().err
    assert "grades_by_order" in said and "python score/score_orig_vllm.py" in said and not Path("o.jsonl").exists()


def test_rows_of_two_score_modes_do_not_mix_in_one_file(stages, capsys):
    flags = _flags("score", "refined.jsonl", "scored.jsonl", "--limit", "3")
    assert cali.main(flags) == 0
    assert cali.main([*flags, "--score_mode", "expected"]) == 1
    assert 'options.score_mode: "sample" before, "expected" now' in capsys.readouterr().err
