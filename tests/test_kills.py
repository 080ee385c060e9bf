"""`kill -9` at random moments, in every teacher stage and on real engines: vLLM in process and a vLLM server.

Whatever the moment, the same command goes on: every input id ends in exactly one of the three files, once and whole,
and greedy rows are those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import world
from processes import ENVIRONMENT, ROOT, vllm_server

pytestmark = pytest.mark.slow

SEED = 20
SUFFIXES = ("", ".filtered.jsonl", ".failed.jsonl")
ROWS = 60
KILLS = {"in process": 2, "server": 3}  # of each of the four stages: 20
MOST = 15  # rows that reach the disk before a kill
FLAGS = {
    "generate": ["refine/generate_response_vllm.py"],
    "refine": ["refine/refine_response_vllm.py"],
    "score_orig": ["score/score_orig_vllm.py"],
    "cali_score": ["score/cali_score_vllm.py"],
}
BAD = [b'{"id": "torn", "prompt"', b'{"id": "empty", "prompt": ""}']


def command(stage: str, source: Path, output: Path, *flags: object) -> list[str]:
    """Greedy, with few rows in flight, so that they reach the disk one after another. The rows that fail by intent
    are 2 in 62."""
    flags = ("--input", source, "--output", output, "--temperature", 0, "--enable_thinking", "false", *flags)
    return [sys.executable, *FLAGS[stage], *map(str, flags)]


def run(argv: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-4000:]
    return done


def contents(output: Path) -> list[bytes]:
    paths = [Path(f"{output}{suffix}") for suffix in SUFFIXES]
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def on_disk(output: Path) -> int:
    return sum(data.count(b"\n") for data in contents(output))


def outcomes(output: Path) -> dict[str, tuple[str, dict]]:
    """{id: (which file, row)}; no line may be torn and no id there twice."""
    found = []
    for suffix, data in zip(SUFFIXES, contents(output), strict=True):
        assert not data or data.endswith(b"\n")
        found += [(suffix, json.loads(line)) for line in data.splitlines()]
    assert len({row["id"] for _, row in found}) == len(found)
    return {row["id"]: (suffix, row) for suffix, row in found}


def kill_once(rows: int, argv: list[str], output: Path) -> None:
    """Start the command and kill it once so many rows are on disk."""
    with Path(f"{output}.log").open("ab") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    try:
        while on_disk(output) < rows:
            assert process.poll() is None, f"ended too soon:\n{Path(f'{output}.log').read_text()[-4000:]}"
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):  # what else it may have started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server():
    with vllm_server("examples/teacher", "--max-model-len", "1024", "--generation-config", "vllm") as (url, _):
        yield ["--base_url", url, "--max_concurrency", 4]


def write(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row).encode() for row in rows]
    lines[7:7] = BAD
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """{stage: (its input, what an undisturbed run makes of it)}, each of `ROWS` rows and some bad lines."""
    directory = tmp_path_factory.mktemp("undisturbed")
    pairs = [row | {"mark": [n, "\u00e9"]} for n, row in enumerate(world.original_pairs(2 * ROWS, seed=SEED))]
    sources = dict.fromkeys(("generate", "refine", "score_orig"), write(directory / "pairs.jsonl", pairs[:ROWS]))
    more = write(directory / "more.jsonl", pairs)
    run(command("refine", more, directory / "refined.jsonl", *server))
    refined = [json.loads(line) for line in (directory / "refined.jsonl").read_bytes().splitlines()]
    sources["cali_score"] = write(directory / "to_score.jsonl", refined[:ROWS])
    runs = {}
    for stage, source in sources.items():
        run(command(stage, source, directory / f"{stage}.jsonl", *server))
        runs[stage] = (source, outcomes(directory / f"{stage}.jsonl"))
    return runs


@pytest.mark.parametrize("engine", KILLS)
@pytest.mark.parametrize("stage", FLAGS)
def test_a_stage_killed_at_random_ends_with_the_rows_of_an_undisturbed_run(
    undisturbed, server, tmp_path, stage, engine
):
    source, expected = undisturbed[stage]
    output = tmp_path / "o.jsonl"
    flags = server if engine == "server" else ["--max_num_seqs", 4]
    argv = command(stage, source, output, *flags)
    draw = random.Random(f"{SEED} {stage} {engine}")
    before = contents(output)
    for _ in range(KILLS[engine]):
        kill_once(on_disk(output) + draw.randint(1, MOST), argv, output)
        after = contents(output)
        for old, new in zip(before, after, strict=True):  # a line once whole stays as it is
            assert new.startswith(old[: old.rfind(b"\n") + 1])
        before = after
    assert KILLS[engine] <= on_disk(output) < ROWS
    last = run(argv)
    assert f"of {ROWS + len(BAD)} rows are finished already" in last.stderr

    found = outcomes(output)
    assert found == expected
    assert set(found) == {row["id"] for row in _good(source)} | {"line-8", "empty"}
    assert sum(suffix == "" for suffix, _ in found.values()) > ROWS / 2
    assert all(found[row["id"]][1]["mark"] == row["mark"] for row in _good(source))


def _good(source: Path) -> list[dict]:
    return [json.loads(line) for line in source.read_bytes().splitlines() if line not in BAD]
