"""A command whose terminal goes away, or whose log cannot be written, comes to its end all the same."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from eval_fixtures import save_reward_model
from processes import ENVIRONMENT, ROOT
from test_openai_engine import reply, server  # noqa: F401 - server is a fixture
from test_server_faults import ROWS, place, rows_of  # noqa: F401 - place is a fixture
from train_fixtures import tiny_model

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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_whose_encoding_lacks_a_character_shows_its_code(place, server, encoding):  # noqa: F811
    (place / "in.jsonl").write_text(json.dumps({"id": "a", "prompt": "What is 世界 😀?"}) + "\n")
    command = [sys.executable, str(ROOT / "refine/generate_response_vllm.py"), *FLAGS, "--base_url", server.url]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--dry_run"], env=environment, capture_output=True, check=True)
    assert rb"What is \u4e16\u754c \U0001f600?" in done.stdout


@pytest.mark.parametrize("nohup", [False, True])
def test_a_hang_up_stops_a_stage_with_the_command_to_go_on_but_not_under_nohup(place, server, nohup):  # noqa: F811
    begun = threading.Event()

    def script(body: dict):
        begun.set()
        time.sleep(0.2)
        return reply("an answer")

    server.script = script
    stage = [sys.executable, str(ROOT / "refine/generate_response_vllm.py"), *FLAGS, "--base_url", server.url]
    stage += ["--max_concurrency", "2"]
    command = ["nohup", *stage] if nohup else stage
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever these tests run under
    )
    assert begun.wait(timeout=60)
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=60)[1]
    if nohup:
        assert process.returncode == 0 and len(rows_of()) == ROWS
    else:
        assert process.returncode == 129 and "stopped by SIGHUP" in said and "To go on, run: python " in said
        assert len(rows_of()) < ROWS


@pytest.mark.parametrize("command", ["run_eval_rm", "score_file", "run_reward_train"])
def test_evaluation_and_training_end_well_whose_log_cannot_be_written(tmp_path, command):
    model = str(tmp_path / "model")
    tiny_model(model) if command == "run_reward_train" else save_reward_model(model)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"id": str(n), "prompt": f"p {n}", "chosen": "a b", "rejected": f"c {n}", "margin": 1.0} for n in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = str(tmp_path / "out")
    flags = {
        "run_eval_rm": ["--model", model, "--benchmarks", str(pairs), "--output_dir", output],
        "score_file": ["--model", model, "--input", str(pairs), "--output", f"{output}.jsonl"],
        "run_reward_train": [
            *("--config", str(ROOT / "RewardTrainer/configs/train/example_bt.yaml"), "--model_name_or_path", model),
            *("--train_file", str(pairs), "--output_dir", output, "--max_steps", "2", "--eval_strategy", "no"),
        ],
    }
    package = "train" if command == "run_reward_train" else "eval"
    module = [sys.executable, "-m", f"RewardTrainer.{package}.{command}", *flags[command]]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(module, env=environment, stdout=full, stderr=full, check=False, timeout=300)
    assert done.returncode == 0
    made = {"run_eval_rm": "out/results.json", "score_file": "out.jsonl", "run_reward_train": "out/model.safetensors"}
    assert (tmp_path / made[command]).stat().st_size


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_native_code_says_on_a_closed_stream_goes_into_no_file(tmp_path, closed):
    code = (
        "import os, sys\n"
        "from distiller.streams import patient_streams\n"
        "with patient_streams(), open('out.jsonl', 'w') as file:\n"
        "    os.write(2, b'a warning')\n"
        "    os.system('echo and a child >&2')\n"
        "    print('said', file=sys.stderr)\n"
        "    file.write('row')\n"
    )
    shell = f'exec {closed}; exec "$@"'
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True)
    assert (tmp_path / "out.jsonl").read_text() == "row" and done.stdout == b""
