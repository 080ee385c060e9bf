"""The stages one after another through the real runner, files and command lines; only the LLM is played by a
function."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml

from distiller.arguments import parse_stage_args
from distiller.engine import Completion
from refine import filter_pairs
from refine import generate_response_vllm as generate
from refine import refine_response_vllm as refine
from score import cali_score_vllm as cali
from score import regrade_ties as regrade
from score import score_orig_vllm as score_orig

ROOT = Path(__file__).parents[1]
CONFIGS = [
    ("refine/configs/example.yaml", refine.RefineArguments),
    ("refine/configs/paper.yaml", refine.RefineArguments),
    ("refine/configs/generate_example.yaml", generate.GenerateArguments),
    ("refine/configs/generate_paper.yaml", generate.GenerateArguments),
    ("score/configs/example.yaml", cali.CaliScoreArguments),
    ("score/configs/paper.yaml", cali.CaliScoreArguments),
    ("score/configs/orig_example.yaml", score_orig.ScoreOrigArguments),
    ("score/configs/orig_paper.yaml", score_orig.ScoreOrigArguments),
    ("score/configs/ties_example.yaml", regrade.RegradeArguments),
    ("score/configs/ties_paper.yaml", regrade.RegradeArguments),
]


class Teacher:
    """Knows the right answer (every number one higher) and grades a text by whether it has it; likes what it sees
    first."""

    capacity = 3

    def __init__(self):
        self.asks = []

    def submit(self, key, ask):
        self.asks.append((key, ask))

    def collect(self):
        waiting, self.asks = self.asks, []
        return [(key, Completion(self.answer(ask), None, "stop", 1, 1, None)) for key, ask in waiting]

    def close(self):
        pass

    def facts(self):
        return {"name": "played"}

    def answer(self, ask) -> str:
        text = ask.messages[-1]["content"]
        truth = str(int(re.search(r"after (\d+)", ask.messages[0]["content"])[1]) + 1)
        if "grade your own edit" in text:
            told = float(re.search(r"was given ([\d.]+)\.", text)[1])
            return f"Better. <score>{told + 4.5}</score>"
        if "RESPONSE A" in text:
            first, second = re.findall(r"===== RESPONSE [AB] =====\n(.*?)\n=====", text, re.S)
            a, b = (8 if truth in response else 3 for response in (first, second))
            return f"<score_a>{a + 1}</score_a>\n<score_b>{b}</score_b>"
        if "FLAWED RESPONSE" in text:
            rejected = re.search(r"===== FLAWED RESPONSE =====\n(.*?)\n=====", text, re.S)[1]
            refined = re.sub(r"\d+", truth, rejected)
            return f"<diagnosis>\nWrong number.\n</diagnosis>\n<refined>\n{refined}\n</refined>"
        return f"{truth}."


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distiller.cli.make_engine", lambda args: Teacher())
    rows = [
        {"id": f"n{n}", "prompt": f"Which number comes after {n}?", "chosen": f"{n + 1}", "mark": n}
        | {"rejected": f"I believe that it is {n + 2} or so, <refined>really</refined>"}
        for n in range(12, 20)
    ]
    _write(tmp_path / "pairs.jsonl", rows)
    return tmp_path


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def _flags(stage, source, output, *more):
    config = ROOT / stage / ("configs/paper.yaml" if "orig" not in more else "configs/orig_paper.yaml")
    prompts = {"refine": "refine.txt", "score": "calibrate.txt"}
    flags = ["--config", str(config), "--input", source, "--output", output]
    flags += ["--prompt_file", str(ROOT / stage / "prompts" / ("strength.txt" if "orig" in more else prompts[stage]))]
    if stage == "score" and "orig" not in more:
        flags += ["--strength_prompt_file", str(ROOT / "score/prompts/strength.txt")]
        flags += ["--refine_prompt_file", str(ROOT / "refine/prompts/refine.txt")]
    return flags + [word for word in more if word != "orig"]


def test_pairs_become_a_training_set_with_margins(place, capsys):
    assert refine.main(_flags("refine", "pairs.jsonl", "data/refined.jsonl")) == 0
    assert cali.main(_flags("score", "data/refined.jsonl", "data/scored.jsonl")) == 0
    assert "warning" not in capsys.readouterr().err
    rows = {row["id"]: row for row in _read("data/scored.jsonl")}
    assert set(rows) == {f"n{n}" for n in range(12, 20)}
    row = rows["n13"]
    assert row == {
        "id": "n13",
        "prompt": "Which number comes after 13?",
        "chosen": "I believe that it is 14 or so, <refined>really</refined>",
        "rejected": "I believe that it is 15 or so, <refined>really</refined>",
        "mark": 13,
        "teacher_response": "14.",
        "diagnosis": "Wrong number.",
        "edit_similarity": row["edit_similarity"],
        "chosen_score": 8.0,
        "rejected_score": 3.5,
        "grades_by_order": [[9.0, 3.0], [8.0, 4.0]],
        "margin": 4.5,
        "original_chosen": "14",
        "original_chosen_score": 8.5,
    }
    assert row["edit_similarity"] == pytest.approx(8 / 9)

    trl = datasets.load_dataset("json", data_files="data/scored.jsonl", split="train", cache_dir="cache")
    assert {"prompt", "chosen", "rejected", "margin"} <= set(trl.column_names)
    assert trl["margin"][:] == [4.5] * 8


def test_a_refinement_with_an_edited_prompt_cannot_be_continued_with_the_old_one(place, capsys):
    edited = place / "mine.txt"
    edited.write_text((ROOT / "refine/prompts/refine.txt").read_text() + "Be quick.\n")
    flags = _flags("refine", "pairs.jsonl", "refined.jsonl")
    assert refine.main([*flags, "--prompt_file", str(edited)]) == 0
    flags = _flags("score", "refined.jsonl", "scored.jsonl")
    assert cali.main(flags) == 1
    assert "another prompt" in capsys.readouterr().err and not Path("scored.jsonl").exists()
    assert cali.main([*flags, "--refine_prompt_file", str(edited)]) == 0


def test_a_filtered_file_is_still_known_by_the_prompt_it_was_refined_with(place, capsys):
    edited = place / "mine.txt"
    edited.write_text((ROOT / "refine/prompts/refine.txt").read_text() + "Be quick.\n")
    assert refine.main([*_flags("refine", "pairs.jsonl", "refined.jsonl"), "--prompt_file", str(edited)]) == 0
    assert filter_pairs.main(["--input", "refined.jsonl", "--output", "once.jsonl", "--max_edit_similarity", "1"]) == 0
    assert filter_pairs.main(["--input", "once.jsonl", "--output", "twice.jsonl", "--max_length_ratio", "3"]) == 0
    flags = _flags("score", "twice.jsonl", "scored.jsonl")
    assert cali.main(flags) == 1
    assert "another prompt" in capsys.readouterr().err and not Path("scored.jsonl").exists()
    assert cali.main([*flags, "--refine_prompt_file", str(edited)]) == 0
    assert len(_read("scored.jsonl")) == 8


def test_a_stage_that_leaves_no_row_says_so(place, capsys):
    assert refine.main(_flags("refine", "pairs.jsonl", "refined.jsonl")) == 0
    flags = _flags("score", "refined.jsonl", "scored.jsonl")
    assert cali.main(flags) == 0 and "warning" not in capsys.readouterr().err
    before = Path("scored.jsonl").read_bytes()
    assert cali.main([*flags, "--min_margin", "9", "--overwrite"]) == 1  # the earlier rows stay
    assert Path("scored.jsonl").read_bytes() == before
    assert cali.main([*_flags("score", "refined.jsonl", "none.jsonl"), "--min_margin", "9"]) == 0
    assert "warning: no row is left: none.jsonl is empty" in capsys.readouterr().err


def test_the_closing_report_speaks_of_the_whole_file_and_not_of_the_last_run(place, capsys):
    flags = _flags("score", "pairs.jsonl", "scored.jsonl", "orig")
    for limit in ("3", "8"):
        assert score_orig.main([*flags, "--limit", limit]) == 0
        report = capsys.readouterr().err
        assert "agrees with the label: 100.0%" in report and f"ties: 0 of {limit} scored pairs" in report
        assert "position bias: +1.00 points" in report and "mean margin: +5.00 points" in report


def test_dropped_ties_are_counted_in_the_report(place, capsys):
    _write(
        place / "ties.jsonl",
        [{"prompt": "after 1?", "chosen": "2", "rejected": "2, surely"}, *_read("pairs.jsonl")[:1]],
    )
    flags = _flags("score", "ties.jsonl", "scored.jsonl", "orig", "--ties", "drop")
    assert score_orig.main(flags) == 0
    assert "ties: 1 of 2 scored pairs" in capsys.readouterr().err
    assert [row["reason"] for row in _read("scored.jsonl.filtered.jsonl")] == ["tie"]


def test_prompts_become_pairs_by_way_of_candidate_files(place):
    flags = ["--config", str(ROOT / "refine/configs/generate_paper.yaml"), "--input", "pairs.jsonl"]
    assert generate.main([*flags, "--output", "good.jsonl", "--model", "good"]) == 0
    _write(place / "bad.jsonl", [{**row, "response": "No idea.", "model": "bad"} for row in _read("good.jsonl")[::-1]])
    flags = _flags("score", "unread", "new.jsonl", "orig", "--responses", "bad.jsonl", "good.jsonl")
    assert score_orig.main(flags) == 0
    pairs = {row["id"]: row for row in _read("new.jsonl")}
    assert len(pairs) == 8
    row = pairs["n13"]
    assert (row["chosen"], row["chosen_model"], row["rejected"], row["rejected_model"]) == (
        "14.",
        "good",
        "No idea.",
        "bad",
    )
    assert (row["chosen_score"], row["rejected_score"], row["mark"]) == (8.5, 3.5, 13)
    assert row["grades_by_order"] == [[9.0, 3.0], [8.0, 4.0]]
    assert score_orig.main(flags) == 0 and len(_read("new.jsonl")) == 8  # resumed: nothing left to do


@pytest.mark.parametrize(("config", "arguments"), CONFIGS)
def test_every_shipped_configuration_is_valid(config, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse_stage_args(arguments, ROOT / config, argv=[])
    args.validate()
    given = yaml.safe_load((ROOT / config).read_text())
    assert given["model"] == ("Qwen/Qwen3-14B" if "paper" in config else "examples/teacher")
    for name in args.PROMPT_FIELDS:
        assert getattr(args, name) is None or Path(getattr(args, name)).is_file()
