"""Every process an engine may have, killed under a real command: it ends within a minute, and the rerun finishes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import world
from processes import ENVIRONMENT, ROOT, kill_one, run_and_kill, vllm_server

pytestmark = pytest.mark.slow

SUFFIXES = ("", ".filtered.jsonl", ".failed.jsonl")
ROWS = 160


def command(pairs: Path, output: Path, *flags: object) -> list[str]:
    flags = ("--input", pairs, "--output", output, "--max_num_seqs", 4, "--enable_thinking", "false", *flags)
    return [sys.executable, "refine/refine_response_vllm.py", *map(str, flags)]


def finish(pairs: Path, output: Path, *flags: object) -> None:
    done = subprocess.run(command(pairs, output, *flags), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def rows_of(output: Path) -> dict[str, dict]:
    """The rows of all three files by id; none may be torn or there twice."""
    data = [Path(f"{output}{suffix}").read_bytes() for suffix in SUFFIXES]
    assert all(not part or part.endswith(b"\n") for part in data)
    rows = [json.loads(line) for part in data for line in part.splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """(file of pairs, the rows of an undisturbed run)."""
    directory = tmp_path_factory.mktemp("whole")
    pairs = directory / "pairs.jsonl"
    world.write_jsonl(pairs, world.original_pairs(ROWS, seed=61))
    finish(pairs, directory / "o.jsonl")
    return pairs, rows_of(directory / "o.jsonl")


def check_end(code: int, said: str, words: str, output: Path) -> dict[str, dict]:
    """The rows that a command kept whose engine was killed."""
    assert code == 2, said[-3000:]
    assert f"the teacher engine gave up: {words}" in said, said[-3000:]
    assert "Finished rows are on disk. To go on, run: python refine/refine_response_vllm.py --input" in said
    kept = rows_of(output)
    assert 5 <= len(kept) < ROWS and not Path(f"{output}.failed.jsonl").read_bytes()
    return kept


@pytest.mark.parametrize(
    ("process", "flags", "environment"),
    [
        ("VLLM::EngineCore", (), {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        ("VLLM::Worker", ("--tensor_parallel_size", 2), {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
    ],
    ids=["engine process", "tensor parallel worker"],
)
def test_a_killed_process_of_vllm_ends_the_command_and_the_rerun_finishes(
    whole, tmp_path, process, flags, environment
):
    pairs, rows = whole
    output = tmp_path / "o.jsonl"
    killed = command(pairs, output, *flags)
    code, said = run_and_kill(killed, output, kill_one(process), ENVIRONMENT | environment)
    kept = check_end(code, said, "vLLM", output)
    assert "exit code -9" in said and "want of memory" in said, said[-3000:]
    finish(pairs, output)
    assert rows_of(output) == rows and rows.items() >= kept.items()


def test_a_killed_actor_ends_the_command_and_the_rerun_finishes(whole, tmp_path):
    pairs, rows = whole
    output = tmp_path / "o.jsonl"
    pool = command(pairs, output, "--num_engines", 2)
    code, said = run_and_kill(pool, output, kill_one("ray::EngineActor"), ENVIRONMENT)
    kept = check_end(code, said, "engine ", output)
    assert "of 2, an actor on Ray, is gone" in said and "Traceback" not in said
    finish(pairs, output, "--num_engines", 2)
    assert rows_of(output) == rows and rows.items() >= kept.items()


def test_a_killed_server_ends_the_command_and_the_rerun_finishes(whole, tmp_path):
    pairs, rows = whole
    output = tmp_path / "o.jsonl"
    with vllm_server("examples/teacher", "--max-model-len", "1024") as (url, server):
        asking = command(pairs, output, "--base_url", url, "--max_concurrency", 4)
        code, said = run_and_kill(asking, output, lambda _: os.killpg(server.pid, signal.SIGKILL), ENVIRONMENT)
    check_end(code, said, f"{url} cannot be reached after 5 retries", output)
    finish(pairs, output)
    assert rows_of(output) == rows
