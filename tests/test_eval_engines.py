"""The ways to run a reward model: an adapter of the user's own, several processes, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from eval_fixtures import pair, write_jsonl

from distiller.records import InputError
from distiller.store import LineFile
from RewardTrainer.eval.engines import load_engine
from RewardTrainer.eval.run_eval_rm import EvalArguments, run

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds, for a machine that has other things to do
ADAPTER = """
import os
import time

def load(model, device):
    return {"model": model, "device": device}

def score(loaded, conversations):
    assert loaded["model"] == "mine" and loaded["device"] in ("cpu", "cuda")
    with open(os.environ["CALLS"], "a") as calls:
        for conversation in conversations:
            calls.write(conversation[-1]["content"] + "\\n")
    time.sleep(float(os.environ.get("NAP", 0)))
    return [float(len(conversation[-1]["content"])) for conversation in conversations]
"""


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """An adapter whose reward is the number of characters, and which writes down what it was asked."""
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    path = tmp_path / "my_model.py"
    path.write_text(ADAPTER)
    return path


def arguments(tmp_path: Path, adapter: Path, **more) -> EvalArguments:
    given = {"model": "mine", "adapter": str(adapter), "benchmarks": str(tmp_path / "pairs.jsonl")}
    return EvalArguments(**{**given, "output_dir": str(tmp_path / "out"), **more})


def scores_of(output: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert len({(line["id"], line["response"]) for line in lines}) == len(lines)
    return {(line["id"], line["response"]): line["score"] for line in lines}


def expected(rows: list[dict]) -> dict[tuple[str, int], float]:
    return {(row["id"], n): float(len(row[name])) for row in rows for n, name in enumerate(("chosen", "rejected"))}


def test_two_functions_make_any_model_a_reward_model(tmp_path, adapter, capsys):
    rows = [pair(n) for n in range(70)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (evaluation,) = run(arguments(tmp_path, adapter))
    assert scores_of(tmp_path / "out") == expected(rows)
    assert evaluation.counts["truncated"] is None  # whether it cuts is the adapter's own affair
    assert "my_model.py will run on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_equal_responses_have_one_reward_whatever_stands_beside_them(tmp_path, processes):
    """The adapter's rewards depend on the place in a batch, as those of any engine do in the last digits."""
    path = tmp_path / "rounding.py"
    path.write_text(
        "def load(model, device):\n    pass\n"
        "def score(loaded, conversations):\n"
        "    return [len(c[-1]['content']) + 1e-6 * place for place, c in enumerate(conversations)]\n"
    )
    rows = [pair(n) for n in range(40)]
    for row in rows[:30]:
        row["rejected"] = row["chosen"]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run(arguments(tmp_path, path, num_processes=processes))
    scores = scores_of(tmp_path / "out")
    assert [scores[row["id"], 0] == scores[row["id"], 1] for row in rows] == [True] * 30 + [False] * 10


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0]", "must return 2 finite numbers for 2 conversations, and returned 1"),
        ("return [1.0, float('nan')]", "returned 2, 1 of them finite"),
    ],
)
def test_an_adapter_that_returns_something_else_is_refused(tmp_path, body, words):
    path = tmp_path / "bad.py"
    path.write_text(f"def load(model, device):\n    pass\ndef score(loaded, conversations):\n    {body}\n")
    write_jsonl(tmp_path / "pairs.jsonl", [pair(0)])
    with pytest.raises(InputError, match=words):
        run(arguments(tmp_path, path))
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_adapter_without_its_functions_or_its_file_is_refused(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def load(model, device):\n    pass\n")
    for adapter in (path, tmp_path / "nothing.py"):
        with pytest.raises(InputError, match="--adapter"):
            load_engine("mine", adapter=str(adapter))


def test_what_an_engine_has_no_use_for_is_said(adapter, capsys):
    load_engine("mine", adapter=str(adapter), dtype="float32", tokens_per_batch=1)
    assert "note: the adapter has no use for --dtype, --tokens_per_batch\n" in capsys.readouterr().err
    load_engine(
        "mine", adapter=str(adapter), trust_remote_code=True, tensor_parallel_size=2, gpu_memory_utilization=0.5
    )
    said = capsys.readouterr().err
    assert all(f"--{name}" in said for name in ("trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization"))
    load_engine("mine", adapter=str(adapter))
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "flag", "value"), [("hf", "gpu_memory_utilization", 0.5), ("vllm", "tokens_per_batch", 8)]
)
def test_a_flag_of_the_other_engine_is_named(engine, flag, value, tmp_path, capsys):
    with pytest.raises(InputError):
        load_engine(str(tmp_path / "no_model"), engine, **{flag: value})
    assert f"note: --engine {engine} has no use for --{flag}\n" in capsys.readouterr().err


def test_an_unknown_engine_is_refused():
    with pytest.raises(InputError, match="--engine sglang: not one of hf, vllm"):
        load_engine("mine", "sglang")


def eval_rm(tmp_path: Path, *flags: object, **environment: str) -> subprocess.Popen:
    command = ["bash", ROOT / "RewardTrainer" / "scripts" / "eval_rm.sh", "--output_dir", tmp_path / "out"]
    command += ["--benchmarks", tmp_path / "pairs.jsonl", *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_several_processes_share_the_rows_and_give_what_one_gives(tmp_path, adapter):
    rows = [pair(n) for n in range(7)] + [pair(9, chosen="")]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = eval_rm(tmp_path, "--model", "mine", "--adapter", adapter, NUM_PROCESSES="3")
    out, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, err
    assert scores_of(tmp_path / "out") == expected(rows[:7])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "results.json", "results.md", "scores.jsonl"}
    assert f"{tmp_path / 'pairs.jsonl'}: 7 of 8 rows" in out
    asked = (tmp_path / "calls.txt").read_text().splitlines()
    assert sorted(asked) == sorted(row[name] for row in rows[:7] for name in ("chosen", "rejected"))


def test_a_process_that_fails_ends_the_command_and_keeps_what_is_done(tmp_path, adapter):
    write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(4)])
    adapter.write_text(ADAPTER.replace("time.sleep", "assert os.environ['EVAL_SHARD'] != '1/2'; time.sleep"))
    done = eval_rm(tmp_path, "--model", "mine", "--adapter", adapter, "--num_processes", 2)
    _, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 1
    assert "error: process 1 of 2 failed (exit code 1)" in err
    assert not (tmp_path / "out" / "results.json").exists()
    assert (tmp_path / "out" / "parts" / "run.json").exists()


def test_a_killed_evaluation_goes_on_without_asking_twice(tmp_path, adapter):
    rows = [pair(n, chosen=f"chosen {n}", rejected=f"rejected {n}") for n in range(64)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = ["--model", "mine", "--adapter", adapter, "--num_processes", 1]
    first = eval_rm(tmp_path, *flags, NAP="2")
    part = tmp_path / "out" / "parts" / "scores-0.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    for overwrite in (False, True):  # two at once would mix their scores
        with pytest.raises(InputError, match="another command is writing"):
            run(arguments(tmp_path, adapter, num_processes=1, overwrite=overwrite))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = part.read_text().splitlines()
    assert 32 <= len(kept) < 128
    with part.open("a") as file:
        file.write('{"benchmark": "torn')
    finished = {(json.loads(line)["id"], json.loads(line)["response"]) for line in kept}
    (tmp_path / "calls.txt").unlink()

    again = eval_rm(tmp_path, *flags)
    _, err = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, err
    assert scores_of(tmp_path / "out") == expected(rows)
    asked = set((tmp_path / "calls.txt").read_text().splitlines())
    assert len(asked) == 128 - len(finished)
    assert not asked & {rows[int(name[3:])][("chosen", "rejected")[n]] for name, n in finished}
    assert not part.parent.exists()


def test_processes_end_when_the_command_that_started_them_is_killed(tmp_path, adapter):
    write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(4)])
    first = eval_rm(tmp_path, "--model", "mine", "--adapter", adapter, "--num_processes", 2, NAP="120")
    locks = [tmp_path / "out" / "parts" / f"lock-{number}" for number in (0, 1)]
    until(lambda: all(map(is_held, locks)), PATIENCE)
    first.send_signal(signal.SIGKILL)
    until(lambda: not any(map(is_held, locks)), 60)  # they would sleep for 120 s, and then end
    first.communicate()
    (evaluation,) = run(arguments(tmp_path, adapter, num_processes=1))
    assert evaluation.counts["scored"] == 4


def until(happens: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with closing(LineFile(lock)) as file:
        try:
            file.lock()
        except InputError:
            return True
    return False


def test_an_unfinished_evaluation_is_not_mixed_with_another_one(tmp_path, adapter):
    write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(20)])
    broken = adapter.with_name("broken.py")
    broken.write_text(ADAPTER.replace("return [float", "return [None and float"))
    with pytest.raises(TypeError):
        run(arguments(tmp_path, broken))
    (evaluation,) = run(arguments(tmp_path, adapter))  # nothing was scored, so nothing is mixed
    assert evaluation.counts["scored"] == 20
    broken.write_text(ADAPTER.replace("return [float", "return [len(conversations) == 32 or None and float"))
    with pytest.raises(TypeError):
        run(arguments(tmp_path, broken))
    manifest = tmp_path / "out" / "parts" / "run.json"
    known = manifest.read_bytes()
    manifest.unlink()  # whose the scores are is not known any more
    with pytest.raises(InputError, match="scores without the run.json"):
        run(arguments(tmp_path, adapter))
    manifest.write_bytes(known)
    with pytest.raises(InputError, match="unfinished evaluation with other settings(.|\n)*adapter(.|\n)*--overwrite"):
        run(arguments(tmp_path, adapter))
    (evaluation,) = run(arguments(tmp_path, adapter, overwrite=True))
    assert evaluation.counts["scored"] == 20
    with pytest.raises(TypeError):
        run(arguments(tmp_path, broken))
    write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(21)])
    with pytest.raises(InputError, match="rows.*before"):
        run(arguments(tmp_path, broken))
