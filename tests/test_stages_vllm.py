"""The real stage scripts, as commands, over real vLLM with a tiny teacher of random weights.
 Such a teacher never keeps the form, so nothing may reach an output of refined or scored rows, and every row must be
accounted for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAIRS = [
    {
        "id": f"p{n}",
        "prompt": f"Which metal is bridge {n} made of?",
        "chosen": "The metal is iron.",
        "rejected": "The metal is green, and its colour is iron.",
        **({"teacher_response": "Iron."} if n % 2 else {}),
    }
    for n in range(4)
]
SCORED = [
    {**pair, "teacher_response": "Iron.", "diagnosis": "Mixed up.", "refined_response": "The metal is iron.", **score}
    for pair, score in zip(PAIRS, [{}, {"rejected_score": 3.0}] * 2, strict=True)
]


def write(path: Path, rows: list[dict | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kinds(output: Path) -> dict[str, list[dict]]:
    suffixes = {"done": "", "filtered": ".filtered.jsonl", "failed": ".failed.jsonl"}
    return {kind: read(Path(f"{output}{suffix}")) for kind, suffix in suffixes.items()}


def command(script: str, teacher: Path, output: Path, *flags: str | Path) -> subprocess.CompletedProcess:
    base = ["--model", teacher, "--output", output, "--max_tokens", "24", "--max_model_len", "512"]
    done = subprocess.run(
        [sys.executable, script, *map(str, base), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def example_prompts(*names: str) -> list[str]:
    """Short prompt files fit a context of 512 tokens; the shipped ones do not."""
    return [f"examples/prompts/{name}.txt" for name in names]


def accounted(output: Path) -> list[str]:
    return sorted(row["id"] for rows in kinds(output).values() for row in rows)


def test_refine_accounts_for_every_row_and_a_rerun_asks_for_nothing(tiny_teacher, tmp_path):
    pairs = write(
        tmp_path / "pairs.jsonl", [*PAIRS, "{torn", {"id": "empty", "prompt": "?", "chosen": "a", "rejected": ""}]
    )
    output = tmp_path / "refined.jsonl"
    flags = ["--input", pairs, "--prompt_file", *example_prompts("refine"), "--max_tries", "2"]
    first = command("refine/refine_response_vllm.py", tiny_teacher, output, *flags)
    rows = kinds(output)
    assert rows["done"] == []
    assert accounted(output) == ["empty", "line-5", "p0", "p1", "p2", "p3"]
    reasons = {row["id"]: row["reason"] for row in rows["failed"]}
    assert reasons["empty"] == "field `rejected` is empty" and reasons["line-5"] == "not valid JSON"
    assert all("cut by max_tokens" in row["reason"] for row in rows["filtered"])
    assert first.returncode == 1  # two of six rows failed at least
    before = {kind: Path(f"{output}{suffix}").read_bytes() for kind, suffix in [("f", ".failed.jsonl"), ("d", "")]}

    again = command("refine/refine_response_vllm.py", tiny_teacher, output, *flags)
    assert again.returncode == 1 and "6 of 6 rows are finished already" in again.stderr
    assert before == {
        kind: Path(f"{output}{suffix}").read_bytes() for kind, suffix in [("f", ".failed.jsonl"), ("d", "")]
    }


def test_no_score_is_made_up_for_a_teacher_that_gives_none(tiny_teacher, tmp_path):
    refined = write(tmp_path / "refined.jsonl", SCORED)
    output = tmp_path / "scored.jsonl"
    files = example_prompts("calibrate", "strength", "refine")
    names = ["--prompt_file", "--strength_prompt_file", "--refine_prompt_file"]
    flags = [
        "--input",
        refined,
        "--max_tries",
        "2",
        *(word for pair in zip(names, files, strict=True) for word in pair),
    ]
    done = command("score/cali_score_vllm.py", tiny_teacher, output, *flags)
    assert done.returncode == 1
    rows = kinds(output)
    assert not rows["done"] and not rows["filtered"]
    reasons = {row["id"]: row["reason"] for row in rows["failed"]}
    assert all(reasons[f"p{n}"].startswith("preference strength: no <score_a>") for n in (0, 2))
    assert all(reasons[f"p{n}"].startswith("calibrated score: no <score>") for n in (1, 3))
    assert all(row["raw"] for row in rows["failed"])


def test_candidates_are_generated_a_model_a_file_and_paired_by_id(tiny_teacher, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"id": pair["id"], "prompt": pair["prompt"]} for pair in PAIRS])
    output = tmp_path / "responses.jsonl"
    done = command("refine/generate_response_vllm.py", tiny_teacher, output, "--input", prompts)
    assert done.returncode == 0 and accounted(output) == ["p0", "p1", "p2", "p3"]
    for row in kinds(output)["done"]:
        assert row["model"] == str(tiny_teacher) and row["response"].strip()

    answers = [
        [{"id": f"p{n}", "prompt": "Which?", "response": f"Answer {m}", "model": f"m{m}"} for n in (m, 2)]
        for m in (0, 1)
    ]
    files = [write(tmp_path / f"{m}.jsonl", rows) for m, rows in enumerate(answers)]
    pairs = tmp_path / "new_pairs.jsonl"
    flags = ["--prompt_file", *example_prompts("strength"), "--responses", *files, "--max_tries", "1"]
    done = command("score/score_orig_vllm.py", tiny_teacher, pairs, *flags)
    rows = kinds(pairs)
    assert done.returncode == 1 and not rows["done"]
    assert sorted(row["id"] for row in rows["filtered"]) == ["p0", "p1"]
    assert {row["reason"] for row in rows["filtered"]} == {"fewer than two different answers"}
    assert [row["id"] for row in rows["failed"]] == ["p2"]


def test_a_dry_run_shows_every_conversation_and_writes_nothing(tiny_teacher, tmp_path):
    refined = write(tmp_path / "refined.jsonl", SCORED)
    output = tmp_path / "scored.jsonl"
    done = command("score/cali_score_vllm.py", tiny_teacher, output, "--input", refined, "--dry_run")
    assert done.returncode == 0 and not output.exists()
    assert "rows: 4" in done.stdout and "asks: 8," in done.stdout  # 3 asks for rows without a score, 1 for the others
    assert done.stdout.count("row p0, ask") == 3 and done.stdout.count("row p1, ask") == 1


def test_a_stage_says_which_command_makes_its_input(tiny_teacher, tmp_path):
    done = command("score/cali_score_vllm.py", tiny_teacher, tmp_path / "o.jsonl", "--input", tmp_path / "none.jsonl")
    assert done.returncode == 1 and "python refine/refine_response_vllm.py" in done.stderr
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    done = command("score/cali_score_vllm.py", tiny_teacher, tmp_path / "o.jsonl", "--input", pairs)
    assert done.returncode == 1 and "python refine/refine_response_vllm.py" in done.stderr
    assert "pairs.jsonl, line 1" in done.stderr and "`teacher_response`" in done.stderr
