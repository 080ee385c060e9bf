"""A command whose terminal goes away, or whose log cannot be written, comes to its end all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENVIRONMENT, ROOT
from test_openai_engine import reply, server  # noqa: F401 - server is a fixture
from test_server_faults import ROWS, place, rows_of  # noqa: F401 - place is a fixture

FLAGS = ["--input", "in.jsonl", "--output", "out.jsonl", "--model", "m", "--top_k", "-1"]


def start(server, stderr, *flags: str, stdout=subprocess.DEVNULL) -> subprocess.Popen:  # noqa: F811
    command = [
        sys.executable,
        str(ROOT / "refine/generate_response_vllm.py"),
        *FLAGS,
        "--base_url",
        server.url,
        *flags,
    ]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=stdout, stderr=stderr)


@pytest.mark.parametrize("end", ["pipe", "full disk", "closed"])
def test_a_log_that_cannot_be_written_ends_no_run(place, server, end):  # noqa: F811
    bad = place / "in.jsonl"
    bad.write_text(bad.read_text() + "{torn\n")  # said on stderr before the first row, like much else
    server.script = lambda body: reply("an answer")
    if end == "pipe":
        read, write = os.pipe()
        process = start(server, write)
        os.close(read)
        os.close(write)
    elif end == "full disk":
        with Path("/dev/full").open("wb") as full:
            process = start(server, full)
    else:
        shell = 'exec 2>&-; exec "$@"'
        command = [sys.executable, str(ROOT / "refine/generate_response_vllm.py"), *FLAGS, "--base_url", server.url]
        process = subprocess.Popen(["bash", "-c", shell, "bash", *command], env=ENVIRONMENT)
    assert process.wait(timeout=60) == 0
    assert len(rows_of()) == ROWS and len(rows_of(".failed.jsonl")) == 1
    assert json.loads(Path("out.jsonl.manifest.json").read_text())["usage"]["asks"] == ROWS


def test_a_dry_run_whose_reader_has_seen_enough_ends_well(place, server):  # noqa: F811
    long = {"id": "long", "prompt": "more than a pipe holds " * 10_000}
    (place / "in.jsonl").write_text(json.dumps(long) + "\n")
    process = start(server, subprocess.PIPE, "--dry_run", stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in process.stderr.read()
