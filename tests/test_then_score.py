"""refine_response_vllm.py --then_score against the two commands one after the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import world
import yaml
from test_stages import ROOT, Teacher, _flags, _read, place  # noqa: F401 - place is a fixture

from distiller.engine import AskError, Completion
from refine import refine_response_vllm as refine
from score import cali_score_vllm as cali

SUFFIXES = ("", ".filtered.jsonl", ".failed.jsonl")


class Odd(Teacher):
    """Fails or refuses some rows at every station of the way, and keeps the asks it was given."""

    asked: list = []

    def submit(self, key, ask):
        super().submit(key, ask)
        self.asked.append(ask)

    def collect(self):
        self.asks, (key, ask) = self.asks[1:], self.asks[0]
        text = ask.messages[0]["content"]
        last = ask.messages[-1]["content"]
        if "after 13" in text and "RESPONSE A" in text:
            return [(key, AskError("too long to compare"))]
        if "after 14" in text and "grade your own edit" in last:
            return [(key, Completion("no grade", None, "stop", 1, 1, None))]
        if "after 15" in text and "grade your own edit" in last:
            return [(key, Completion("<score>1</score>", None, "stop", 1, 1, None))]
        if "after 16" in text and "FLAWED RESPONSE" in text and len(ask.messages) == 1:
            return [(key, Completion("<diagnosis>...", None, "length", 1, 1, None))]
        return [(key, Completion(self.answer(ask), None, "stop", 1, 1, None))]


@pytest.fixture
def odd(place, monkeypatch):  # noqa: F811
    """The place of the played stages with a configuration of stage 2 whose paths hold anywhere."""
    monkeypatch.setattr("distiller.cli.make_engine", lambda args: Odd())
    monkeypatch.setattr(Odd, "asked", [])
    config = yaml.safe_load((ROOT / "score/configs/paper.yaml").read_text())
    config |= {name: str(ROOT / path) for name, path in config.items() if name.endswith("prompt_file")}
    (place / "score.yaml").write_text(yaml.safe_dump(config))
    return place


def both(*more: str) -> int:
    flags = _flags("refine", "pairs.jsonl", "both.jsonl", "--then_score", "--score_config", "score.yaml")
    return refine.main([*flags, "--max_failure_rate", "1", *more])


def by_id(path: str) -> dict[str, dict]:
    return {row["id"]: row for row in _read(path)}


def test_the_rows_are_those_of_the_two_commands_in_the_same_three_files(odd, capsys):
    assert refine.main([*_flags("refine", "pairs.jsonl", "refined.jsonl"), "--max_failure_rate", "1"]) == 0
    assert cali.main([*_flags("score", "refined.jsonl", "scored.jsonl"), "--max_failure_rate", "1"]) == 0
    separate, Odd.asked = Odd.asked, []
    capsys.readouterr()
    assert both() == 0
    assert "note:" not in capsys.readouterr().err
    assert by_id("both.jsonl") == by_id("scored.jsonl") and len(by_id("both.jsonl")) == 4
    filtered = by_id("refined.jsonl.filtered.jsonl") | by_id("scored.jsonl.filtered.jsonl")
    assert by_id("both.jsonl.filtered.jsonl") == filtered and set(filtered) == {"n15", "n16"}
    failed = {identifier: (row["reason"], row["raw"]) for identifier, row in by_id("both.jsonl.failed.jsonl").items()}
    expected = by_id("scored.jsonl.failed.jsonl")
    assert failed == {identifier: (row["reason"], row["raw"]) for identifier, row in expected.items()}
    assert set(failed) == {"n13", "n14"}
    asked = [
        {(ask.messages[0]["content"], len(ask.messages), ask.seed) for ask in asks} for asks in (separate, Odd.asked)
    ]
    assert asked[0] == asked[1] and len(Odd.asked) == len(separate)


def test_a_row_is_scored_right_after_its_refinement_and_not_after_all_of_them(odd):
    assert both() == 0
    stations = ["edit" if len(ask.messages) > 1 else "other" for ask in Odd.asked]
    assert "other" in stations[stations.index("edit") :]


def test_each_stage_has_its_own_longest_reply(odd):
    config = yaml.safe_load(Path("score.yaml").read_text())
    Path("score.yaml").write_text(yaml.safe_dump(config | {"max_tokens": 77}))
    assert both() == 0
    longest = {
        (len(ask.messages), "RESPONSE A" in ask.messages[0]["content"]): ask.sampling and ask.sampling.max_tokens
        for ask in Odd.asked
    }
    assert longest == {(1, False): None, (1, True): 77, (3, False): 77}


def test_a_dry_run_bounds_the_replies_by_the_longer_of_the_two_stages(odd, capsys):
    for lengths, longest in (((9, 7), 9), ((7, 9), 9)):
        config = yaml.safe_load(Path("score.yaml").read_text()) | {"max_tokens": lengths[1]}
        Path("score.yaml").write_text(yaml.safe_dump(config))
        server = ("--base_url", "http://127.0.0.1:9/v1", "--model", "no/such-model")
        assert both("--dry_run", "--max_tokens", str(lengths[0]), *server) == 0
        assert f"(max_tokens {longest} each)" in capsys.readouterr().out


def test_scoring_goes_on_from_the_refinement_prompt_of_this_command(odd):
    edited = (ROOT / "refine/prompts/refine.txt").read_text() + "Be quick.\n"
    Path("mine.txt").write_text(edited)
    assert both("--prompt_file", "mine.txt") == 0
    graded = [ask.messages for ask in Odd.asked if len(ask.messages) == 3]
    assert graded and all(messages[0]["content"].endswith("Be quick.") for messages in graded)


def test_other_scoring_is_another_run_and_its_sampling_is_the_commands(odd, capsys):
    assert both("--temperature", "0") == 0
    assert "note: scoring takes --temperature 0.0 from this command, not 0.7" in capsys.readouterr().err
    assert {ask.sampling.temperature for ask in Odd.asked if ask.sampling} == {0.0}
    config = yaml.safe_load(Path("score.yaml").read_text())
    Path("score.yaml").write_text(yaml.safe_dump(config | {"min_margin": 9}))
    assert both("--temperature", "0") == 1
    assert "then_score.options.min_margin: 0.0 before, 9.0 now" in capsys.readouterr().err
    flags = [*_flags("refine", "pairs.jsonl", "both.jsonl"), "--temperature", "0"]
    assert refine.main(flags) == 1 and "then_score" in capsys.readouterr().err
    before = by_id("both.jsonl")
    assert both("--temperature", "0", "--overwrite") == 1  # no row is finished: the earlier ones stay
    assert by_id("both.jsonl") == before and len(by_id("both.jsonl.new.filtered.jsonl")) == 6


def test_a_wrong_configuration_of_stage_2_is_refused_before_anything_is_written(odd, capsys):
    config = Path("score.yaml").read_text()
    Path("score.yaml").write_text("min_margn: 1\n")
    with pytest.raises(SystemExit):
        both()
    assert "score.yaml, line 1: unknown key `min_margn`, did you mean `min_margin`?" in capsys.readouterr().err
    Path("score.yaml").write_text(yaml.safe_dump(yaml.safe_load(config) | {"prompt_file": "none.txt"}))
    assert both() == 1
    assert "none.txt" in capsys.readouterr().err and not Path("both.jsonl").exists()


@pytest.mark.slow
def test_with_a_real_engine_the_rows_are_the_same_and_the_second_prefill_comes_from_the_cache(tmp_path):
    world.write_jsonl(tmp_path / "pairs.jsonl", world.original_pairs(40, seed=51))
    refined, scored, both = (tmp_path / name for name in ("refined.jsonl", "scored.jsonl", "both.jsonl"))

    def run(script: str, source: Path, output: Path, *flags: str) -> None:
        command = [sys.executable, script, "--input", source, "--output", output, "--max_failure_rate", "1", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    run("refine/refine_response_vllm.py", tmp_path / "pairs.jsonl", refined)
    run("score/cali_score_vllm.py", refined, scored)
    run("refine/refine_response_vllm.py", tmp_path / "pairs.jsonl", both, "--then_score")
    assert by_id(both) == by_id(scored) and len(by_id(both)) > 20
    filtered = by_id(f"{refined}.filtered.jsonl") | by_id(f"{scored}.filtered.jsonl")
    assert by_id(f"{both}.filtered.jsonl") == filtered
    used = {path: json.loads(Path(f"{path}.manifest.json").read_text())["usage"] for path in (refined, scored, both)}
    for name in ("asks", "prompt_tokens", "completion_tokens"):
        assert used[both][name] == used[refined][name] + used[scored][name]
    assert used[both]["cached_tokens"] > used[refined]["cached_tokens"] + used[scored]["cached_tokens"]
