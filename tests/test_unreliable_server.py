"""A teacher stage on a real vLLM server through a proxy that lets one request in five fail (see fault_proxy.py)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import world
from fault_proxy import INJECTED, KINDS
from processes import ENVIRONMENT, ROOT, vllm_server

pytestmark = pytest.mark.slow

ROWS = 1000
REASONS = {
    "429": "^HTTP 429 from the server",
    "500": "^HTTP 500 from the server",
    "silence": "^no answer after 5 retries: Request timed out",
    "hang up": "^no answer after 5 retries",
    "half": "^no answer after 5 retries",
}


def rows_of(path) -> dict[str, dict]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return {row["id"]: row for row in map(json.loads, data.splitlines())}


def test_faults_of_one_request_in_five_cost_no_row_but_those_that_always_fail(tmp_path):
    rows = [
        {"id": f"p{n}", "prompt": pair["prompt"]}
        for n, pair in enumerate(world.original_pairs(ROWS - len(KINDS), seed=63))
    ]
    cursed = {f"cursed {kind}": {"id": f"cursed {kind}", "prompt": f"always {kind}"} for kind in KINDS}
    rows[500:500] = cursed.values()
    world.write_jsonl(tmp_path / "in.jsonl", rows)
    with vllm_server("examples/teacher", "--max-model-len", "1024") as (url, _):
        command = ["benchmarks/server_faults.py", "--base_url", url, "--input", tmp_path / "in.jsonl"]
        command = [sys.executable, *map(str, command), "--output_dir", str(tmp_path / "o")]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    faulty, clean = rows_of(tmp_path / "o/faulty.jsonl"), rows_of(tmp_path / "o/clean.jsonl")
    failed, filtered = (rows_of(tmp_path / f"o/faulty.jsonl.{kind}.jsonl") for kind in ("failed", "filtered"))

    assert len(faulty) + len(failed) + len(filtered) == ROWS and not filtered
    assert faulty.keys() | failed.keys() == {row["id"] for row in rows} and len(faulty) >= 0.995 * ROWS
    assert failed.keys() >= cursed.keys()
    for identifier, row in failed.items():
        reason = REASONS.get(identifier.removeprefix("cursed "), "|".join(REASONS.values()))
        assert re.search(reason, row["reason"]), row
    assert INJECTED not in (tmp_path / "o/faulty.jsonl").read_text()
    assert clean.keys() >= {row["id"] for row in rows} - cursed.keys()  # a cursed prompt makes no sense to the teacher
    assert all(clean[identifier] == row for identifier, row in faulty.items())

    said = json.loads(done.stdout.splitlines()[-1])
    faults, ratios = said["faults"], said["ratios"]
    assert all(faults[kind] > 25 for kind in KINDS) and faults["requests"] > 1.2 * ROWS
    assert said["benchmark"] == "server_faults" and ratios["same_answers"] == 1
    assert ratios["done"] == pytest.approx(len(faulty) / ROWS, abs=1e-4) and ratios["faulty_over_clean_wall_time"] > 0
