"""RayEngine on a real local Ray, with real vLLM actors on CPU."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import world
from processes import ENVIRONMENT, ROOT
from test_vllm_engine import ASKS, BAD, GREEDY, MAX_MODEL_LEN, SAMPLED, run_driver, user

from distiller.arguments import StageArguments
from distiller.ray_engine import Balance
from distiller.records import InputError


def test_a_new_row_goes_to_the_least_busy_engine_and_its_next_ask_to_the_same():
    draw, balance, flying = random.Random(0), Balance(4), {}
    homes: dict[int, int] = {}
    for key in range(3000):
        if len(flying) >= 40:  # some come back, and half of their rows ask again
            came = draw.sample(list(flying), 20)
            for back in came:
                balance.release(flying.pop(back))
            for back in came[::2]:
                flying[back] = balance.take(back)
                assert flying[back] == homes[back]
        idle = min(balance.load)
        homes[key] = flying[key] = balance.take(key)
        assert balance.load[homes[key]] == idle + 1
    assert sum(balance.load) == len(flying) and balance.busy
    for number in flying.values():
        balance.release(number)
    assert balance.load == [0] * 4 and not balance.busy


def test_a_pool_and_a_server_exclude_each_other():
    args = StageArguments(input="i", output="o", model="m", num_engines=2, base_url="http://localhost/v1")
    with pytest.raises(InputError, match="--num_engines and --base_url"):
        args.validate()


@pytest.mark.slow
def test_a_pool_says_what_one_engine_says_and_holds_no_answer_back(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Eos is never likely with random weights: long answers are long.
    slow = [user("bridge"), 7, SAMPLED | {"max_tokens": MAX_MODEL_LEN - 20}]
    one = {"model": str(tiny_teacher), "max_model_len": MAX_MODEL_LEN}
    pool = one | {"num_engines": 2}
    rounds = [[slow, *ASKS], BAD + ASKS[:1], [[*ask, GREEDY] for ask in ASKS[:6]]]
    jobs = [{"arguments": kind, "sampling": SAMPLED, "rounds": rounds} for kind in (one, pool)]
    jobs.append({"arguments": one, "sampling": GREEDY, "rounds": [ASKS[:6]]})
    alone, pooled, greedy = run_driver(jobs, tmp_path)
    for answers, others in zip(alone["rounds"], pooled["rounds"], strict=True):
        assert [strip_cache(answer) for answer in answers] == [strip_cache(other) for other in others]
    assert [strip_cache(answer) for answer in greedy["rounds"][0]] == [strip_cache(a) for a in pooled["rounds"][2]]
    assert pooled["capacity"] == 2 * alone["capacity"] and pooled["facts"] == alone["facts"]
    assert pooled["rounds"][0][0]["completion_tokens"] > 2 * SAMPLED["max_tokens"]
    for engine in (alone, pooled):
        lengths = [answer["completion_tokens"] for answer in engine["rounds"][0]]
        assert engine["written"][0][-1] == [len(lengths), sum(lengths)]
        came = [lengths[key] for key in engine["orders"][0]]
        assert any(tokens > sum(came[:answers]) for answers, tokens in engine["written"][0])  # of replies under way
    assert pooled["orders"][0][-1] == 0  # asked first, answered last, and all others before it


def strip_cache(answer: dict) -> dict:
    """What is found in a cache depends on which engine was asked before."""
    return {name: value for name, value in answer.items() if name != "cached_tokens"}


def command(pairs: Path, output: Path, *flags: str) -> list[str]:
    flags = ("--input", str(pairs), "--output", str(output), "--max_num_seqs", "4", *flags)
    return [sys.executable, "refine/refine_response_vllm.py", *flags]


@pytest.mark.slow
def test_what_cannot_start_in_a_cluster_is_refused_with_its_reason_and_not_waited_for(tmp_path):
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "o.jsonl"
    world.write_jsonl(pairs, world.original_pairs(3, seed=62))
    ray = str(Path(sys.executable).parent / "ray")
    environment = ENVIRONMENT | {"RAY_ADDRESS": "127.0.0.1:6391", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}  # Ray asks for one

    def refusal(*flags: str, **other: str) -> str:
        own = environment | other
        done = subprocess.run(
            command(pairs, output, *flags), cwd=ROOT, env=own, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
        return done.stderr

    start = "the teacher engine did not start: "
    assert f"{start}Ray at RAY_ADDRESS=127.0.0.1:6391 cannot be reached" in refusal("--num_engines", "1")
    head = [ray, "start", "--head", "--port=6391", "--num-cpus=1", "--include-dashboard=false", "--block"]
    cluster = subprocess.Popen([*head, "--object-store-memory=100000000"], env=environment, stdout=subprocess.PIPE)
    try:
        wait_for_cluster(environment)
        assert "room for 1" in refusal("--num_engines", "2")
        assert "InvalidAuthToken" in refusal("--num_engines", "1", RAY_AUTH_TOKEN="f" * 64)
        assert f"{start}max_tokens 160 leaves no room" in refusal("--num_engines", "1", "--max_model_len", "100")
    finally:
        cluster.terminate()
        cluster.wait()


def wait_for_cluster(environment: dict[str, str]) -> None:
    status = [str(Path(sys.executable).parent / "ray"), "status"]
    deadline = time.monotonic() + 180
    while subprocess.run(status, env=environment, capture_output=True, timeout=60).returncode:
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(0.5)
