"""All commands with a real instruct model, `REAL_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct make test-all` (20 minutes
more on 2 cores): no row is lost, and no echo or announcement passes for an edit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distiller.templates import load_prompt
from refine.conversation import REFINE_PROMPT, REFINE_VARIABLES, is_echo

ROOT = Path(__file__).resolve().parents[1]
MODEL = os.environ.get("REAL_MODEL")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not MODEL, reason="REAL_MODEL names no model")
def test_every_row_of_every_command_ends_somewhere_and_nothing_poor_passes(tmp_path):
    command = [sys.executable, "benchmarks/real_teacher.py", "--model", MODEL, "--rows", "12", "--work_dir", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    kinds = ("done", "filtered", "failed")
    for stage, rows in (("refine", 12), ("strength", 12), ("pairwise_scores", 24), ("pairwise_verdict", 24)):
        assert found[stage]["exit_code"] == 0 and sum(found[stage][kind] for kind in kinds) == rows, stage
    if "score" in found:
        assert sum(found["score"][kind] for kind in kinds) == found["refine"]["done"]
    own = load_prompt(ROOT / REFINE_PROMPT, REFINE_VARIABLES).instructions
    for line in (tmp_path / "refine.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert not is_echo(row["refined_response"], own) and not is_echo(row["diagnosis"], own), row
    assert found["train"]["exit_code"] == found["eval"]["exit_code"] == 0
    assert len(found["train"]["losses"]) == 3 and all(map(math.isfinite, found["train"]["losses"]))
    assert 0 <= found["eval"]["accuracy"]["all"] <= 1
