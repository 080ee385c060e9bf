"""The cache of the teacher's log-probabilities on disk, with made-up distributions: no model and no vLLM."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distiller.engine import Ask, AskError
from distiller.logprob_cache import PATTERN, TOKENS, CacheInfo, LogprobCache, TokenLogprobs, hash_ids, write_shard
from distiller.logprob_store import ShardFiles
from distiller.manifest import Manifest
from distiller.records import InputError
from distiller.runner import Done, Failed, run_stage
from distiller.vllm_logprobs import ResponseRead

VOCABULARY = 151_936  # Qwen's: too large for 16-bit ids
HALF = {"rtol": 2.0**-11, "atol": 2.0**-25}  # a float16's rounding error, relative and (near 0) absolute


def distribution(rng: np.random.Generator, length: int, vocab: int) -> np.ndarray:
    """(length, vocab) log-probabilities in full precision, from nearly certain to nearly uniform."""
    logits = rng.normal(size=(length, vocab)) * rng.uniform(0.1, 8, size=(length, 1))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def made_up(seed: int, length: int, top_k: int, vocab: int = 300) -> tuple[TokenLogprobs, np.ndarray]:
    """A row of the cache, and the distributions it was taken from."""
    rng = np.random.default_rng(seed)
    whole = distribution(rng, length, vocab)
    tokens, top = rng.integers(vocab, size=length), np.argsort(-whole, axis=-1)[:, :top_k]
    own = np.take_along_axis(whole, tokens[:, None], -1)[:, 0]
    return TokenLogprobs.measured([1, 2, seed], tokens, own, top, np.take_along_axis(whole, top, -1)), whole


def write(directory: Path, rows: list[tuple[str, TokenLogprobs]], number: int = 0, **info) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / PATTERN.replace("*", f"{number:05}")
    write_shard(path, CacheInfo(**({"top_k": 8, "vocab_size": 300, "model": "m", "tokenizer": "t"} | info)), rows)
    return path


def same(a: TokenLogprobs, b: TokenLogprobs) -> bool:
    return a.prompt_hash == b.prompt_hash and all((getattr(a, name) == getattr(b, name)).all() for name in TOKENS)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("vocab_size", [300, 65_536, 65_537, VOCABULARY])
def test_what_was_measured_is_read_back_by_id_in_any_order(vocab_size, tmp_path):
    rows = {f"row-{n}-é": made_up(n, 1 + n % 7, 8) for n in range(40)}
    shift = vocab_size - 300  # so that the largest ids occur
    rows = {
        name: (replace(row, token_ids=row.token_ids + shift, top_ids=row.top_ids + shift), whole)
        for name, (row, whole) in rows.items()
    }
    given = [(name, row) for name, (row, _) in rows.items()]
    write(tmp_path, given[:25], 0, vocab_size=vocab_size)
    write(tmp_path, given[25:], 1, vocab_size=vocab_size)
    cache = LogprobCache(tmp_path)
    assert list(cache) == list(rows) and len(cache) == 40 and "row-3-é" in cache and "row-3" not in cache
    for name in random.Random(0).sample(list(rows), 40):
        row, whole = rows[name]
        read = cache[name]
        assert (read.token_ids == row.token_ids).all() and (read.top_ids == row.top_ids).all()
        for attribute in ("token_logprobs", "top_logprobs"):
            assert np.allclose(getattr(read, attribute), getattr(row, attribute), **HALF)
        top = np.take_along_axis(np.exp(whole), row.top_ids - shift, -1)
        assert np.allclose(1 - read.tail, top.sum(-1), atol=2.0**-11)
        assert np.allclose(read.tail, 1 - top.sum(-1), rtol=2.0**-11, atol=1e-7)  # a small rest keeps its digits


def test_what_has_no_probability_is_a_number_that_no_loss_turns_into_nan(tmp_path):
    row, _ = made_up(0, 3, 8)
    row.top_logprobs[1, 4:], row.token_logprobs[2] = -np.inf, -1e9
    write(tmp_path, [("a", row)])
    read = LogprobCache(tmp_path)["a"]
    assert np.isfinite(read.top_logprobs).all() and np.isfinite(read.token_logprobs).all()
    assert (np.exp(read.top_logprobs[1, 4:]) == 0).all() and np.exp(read.token_logprobs[2]) == 0


def test_the_tempered_distribution_given_the_top_k_is_within_the_documented_bounds(tmp_path):
    row, whole = made_up(3, 50, 40, vocab=2000)
    write(tmp_path, [("a", row)], top_k=40)
    read = LogprobCache(tmp_path)["a"]
    for temperature in (0.5, 1.0, 2.0):
        powers = np.exp(whole / temperature)  # (50, 2000)
        kept = np.take_along_axis(powers, row.top_ids, -1)
        mine = np.exp(read.top_logprobs / temperature)
        assert np.allclose(mine / mine.sum(-1, keepdims=True), kept / kept.sum(-1, keepdims=True), rtol=0.02)
        left_out, low = powers.sum(-1) - kept.sum(-1), row.tail ** (1 / temperature)
        assert (left_out <= low * (1 + 1e-6) if temperature <= 1 else left_out >= low * (1 - 1e-6)).all()
        if temperature >= 1:
            assert (left_out <= (2000 - 40) ** (1 - 1 / temperature) * low * (1 + 1e-6)).all()


def test_at_most_400_bytes_a_token_at_64_candidates_everything_included(tmp_path):
    rng, rows = random.Random(1), []
    for n in range(60):  # short responses: what a row costs by itself is shared by few tokens
        row, _ = made_up(n, rng.randint(10, 50), 64)
        rows.append((str(uuid.UUID(int=n)), row))
    write(tmp_path / "wide", rows, top_k=64, vocab_size=VOCABULARY)
    write(tmp_path / "narrow", rows, top_k=64, vocab_size=300)
    tokens = sum(len(row.token_ids) for _, row in rows)
    for name, most in (("wide", 400), ("narrow", 272)):
        size = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        assert 250 < size / tokens <= most
        coverage = LogprobCache(tmp_path / name).coverage()
        assert (coverage.bytes, coverage.tokens, coverage.rows) == (size, tokens, 60)


def test_coverage_is_the_probability_mass_of_the_top_k(tmp_path):
    rows = [made_up(n, 100, 8) for n in range(20)]
    write(tmp_path, [(str(n), row) for n, (row, _) in enumerate(rows[:9])], 0)
    write(tmp_path, [(str(n), row) for n, (row, _) in enumerate(rows[9:], 9)], 1)
    mass = np.concatenate([np.sort(np.exp(whole), axis=-1)[:, -8:].sum(-1) for _, whole in rows])
    coverage = LogprobCache(tmp_path).coverage()
    assert coverage.mean == pytest.approx(mass.mean(), abs=1e-4)
    for percent, least in coverage.percentiles.items():
        assert least == pytest.approx(np.percentile(mass, percent), abs=1e-3)
    assert {5.0, 1.0} <= set(coverage.percentiles) and f"{coverage.mean:.4f}" in str(coverage)


# ----------------------------------------------------------------------------------------------------------- alignment


def test_a_row_is_checked_against_the_tokens_it_was_made_from(tmp_path):
    row, _ = made_up(5, 6, 8)
    write(tmp_path, [("a", made_up(4, 3, 8)[0]), ("b", row)])
    cache, tokens = LogprobCache(tmp_path), row.token_ids.tolist()
    cache.check("b", tokens)
    cache.check("b", np.array(tokens, dtype=np.int32), [1, 2, 5])
    for wrong in (tokens[:-1], [*tokens, 2], [*tokens[:3], tokens[3] + 1, *tokens[4:]], []):
        with pytest.raises(InputError, match="row b: .* another response.*--student_model"):
            cache.check("b", wrong)
    with pytest.raises(InputError, match="6 tokens there and 6 here, different from token 3 on"):
        cache.check("b", [*tokens[:3], tokens[3] + 1, *tokens[4:]])
    with pytest.raises(InputError, match="row b: .* after another prompt"):
        cache.check("b", tokens, [1, 2, 4])
    for missing in (lambda: cache["c"], lambda: cache.check("c", tokens)):
        with pytest.raises(InputError, match="row c is not in .*cache_teacher_logprobs_vllm"):
            missing()


def test_the_hash_of_a_prompt_tells_every_change_and_no_other_number_type():
    known = [1, 2, 70_000]
    assert hash_ids(known) == hash_ids(np.array(known)) == hash_ids(np.array(known, dtype=np.int32))
    assert len({hash_ids(ids) for ids in (known, known[:2], known[::-1], [1, 2, 70_001], [])}) == 5


# -------------------------------------------------------------------------------------------------------------- damage


def read_all(directory: Path) -> None:
    cache = LogprobCache(directory)
    for identifier in cache:
        _ = cache[identifier]


def test_a_shard_cut_anywhere_or_with_any_bit_changed_is_refused_by_name(tmp_path):
    path = write(tmp_path, [(f"r{n}", made_up(n, 3, 8)[0]) for n in range(4)])
    whole, rng = path.read_bytes(), random.Random(2)
    read_all(tmp_path)
    for size in (0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"{path.name}: damaged .*delete this file and run"):
            read_all(tmp_path)
    for _ in range(400):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(InputError, match=rf"{path.name}: damaged .*delete this file and run"):
            read_all(tmp_path)


def test_shards_of_two_caches_or_with_one_row_twice_do_not_mix(tmp_path):
    rows = [("a", made_up(0, 3, 8)[0])]
    write(tmp_path / "other", rows, 0)
    write(tmp_path / "other", [("b", rows[0][1])], 1, tokenizer="another")
    with pytest.raises(InputError, match="00001.safetensors is of another cache"):
        LogprobCache(tmp_path / "other")
    write(tmp_path / "twice", rows, 0)
    write(tmp_path / "twice", rows, 1)
    with pytest.raises(InputError, match="row a is in .*00000.safetensors too"):
        LogprobCache(tmp_path / "twice")


def test_no_cache_names_the_command_that_makes_it(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="python refine/cache_teacher_logprobs_vllm.py"):
            LogprobCache(path)


# ----------------------------------------------------------------------------------------------------------- processes


def digest(cache: LogprobCache, seed: int) -> dict[str, float]:
    """Reads all rows in an order of its own."""
    return {
        name: float(cache[name].top_logprobs.sum()) for name in random.Random(seed).sample(list(cache), len(cache))
    }


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_read_one_cache_at_once(method, tmp_path):
    for number in range(3):
        write(tmp_path, [(f"{number}-{n}", made_up(n + number, 20, 8)[0]) for n in range(50)], number)
    cache = LogprobCache(tmp_path)
    known = digest(cache, 0)
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(digest, [cache] * 6, range(6))) == [known] * 6
    assert digest(pickle.loads(pickle.dumps(cache)), 1) == known


def test_reading_a_row_does_not_load_its_shard(tmp_path):
    row, _ = made_up(0, 20, 64)
    write(tmp_path, [(str(n), row) for n in range(8000)], top_k=64, vocab_size=VOCABULARY)
    assert next(tmp_path.iterdir()).stat().st_size > 60e6
    child = start("memory", tmp_path)
    used = int(child.communicate()[0])
    assert child.returncode == 0 and used < 20e6


# ------------------------------------------------------------------------------------------------------------- writing


class ScriptedEngine:
    """Answers with made-up distributions that depend on the ask alone; refuses some."""

    capacity = 8

    def __init__(self, seed: int = 0):
        self.random, self.flying, self.asked = random.Random(seed), {}, 0

    def submit(self, key, ask):
        self.flying[key] = ask.seed
        self.asked += 1

    def collect(self):
        keys = self.random.sample(sorted(self.flying), self.random.randint(1, len(self.flying)))
        return [(key, answer(self.flying.pop(key))) for key in keys]

    def close(self):
        pass

    def facts(self):
        return {"engine": "scripted"}


def answer(number: int) -> ResponseRead | AskError:
    if number % 10 == 3:
        return AskError(f"{number} tokens are too many")
    tokens, _ = made_up(number, 1 + number % 9, 8)
    return ResponseRead("", None, "stop", 1, 1, None, tokens=tokens)


def work(row):
    reply = yield Ask([{"role": "user", "content": "?"}], row["n"])
    return Failed(str(reply)) if isinstance(reply, AskError) else Done({"id": row["id"], "logprobs": reply.tokens})


def stage(output: Path, count: int, shard_tokens: int = 60, engine=None, top_k: int = 8, **options):
    info = CacheInfo(top_k, 300, "m", "t")
    return run_stage(
        [{"id": f"r{n}", "n": n} for n in range(count)],
        work,
        lambda: engine or ScriptedEngine(),
        output,
        Manifest({"stage": "test", "top_k": top_k}),
        total=count,
        max_failure_rate=1,
        open_done=lambda path: ShardFiles(path, info, shard_tokens),
        **options,
    )


def accounted(output: Path) -> tuple[set[str], set[str]]:
    """Cached and failed ids; each must be there once, whole and right."""
    cache = LogprobCache(output)
    failed = [json.loads(line) for line in Path(f"{output}.failed.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in failed}) == len(failed)
    for identifier in cache:
        known, _ = made_up(int(identifier[1:]), 1 + int(identifier[1:]) % 9, 8)
        read = cache[identifier]
        cache.check(identifier, known.token_ids, [1, 2, int(identifier[1:])])
        assert (read.top_ids == known.top_ids).all()
        assert np.allclose(read.top_logprobs, known.top_logprobs, **HALF)
    return set(cache), {row["id"] for row in failed}


def expected(count: int) -> tuple[set[str], set[str]]:
    ids = {f"r{n}" for n in range(count)}
    failed = {f"r{n}" for n in range(3, count, 10)}
    return ids - failed, failed


def test_rows_go_to_shards_of_the_asked_size_and_a_rerun_asks_for_nothing(tmp_path):
    output = tmp_path / "cache"
    summary = stage(output, 200)
    assert accounted(output) == expected(200) and summary.counts == {"done": 180, "failed": 20}
    shards = sorted(output.glob(PATTERN))
    before = {path: path.read_bytes() for path in shards}
    assert len(shards) > 10
    engine = ScriptedEngine()
    assert stage(output, 200, engine=engine).counts == summary.counts and engine.asked == 0
    assert {path: path.read_bytes() for path in sorted(output.glob(PATTERN))} == before


def test_a_run_that_differs_is_refused_and_overwrite_starts_anew(tmp_path):
    output = tmp_path / "cache"
    stage(output, 50)
    with pytest.raises(InputError, match="top_k: 8 before, 4 now"):
        stage(output, 50, top_k=4)
    assert accounted(output) == expected(50)
    stage(output, 20, overwrite=True)
    assert accounted(output) == expected(20)
    Path(f"{output}.manifest.json").unlink()
    with pytest.raises(InputError, match="not its manifest"):
        stage(output, 20)


def test_a_shard_of_another_cache_is_not_counted_as_done(tmp_path):
    stage(tmp_path / "other", 100, top_k=4)
    stage(tmp_path / "cache", 20)
    strange = tmp_path / "cache" / PATTERN.replace("*", "00099")
    strange.write_bytes(sorted((tmp_path / "other").glob(PATTERN))[-1].read_bytes())
    with pytest.raises(InputError, match="00099.safetensors is of another cache"):
        stage(tmp_path / "cache", 100)
    strange.unlink()
    stage(tmp_path / "cache", 100)
    assert accounted(tmp_path / "cache") == expected(100)


def test_failed_rows_run_again_where_asked_for(tmp_path):
    output = tmp_path / "cache"
    stage(output, 50)
    stage(output, 50, retry_failed=True)
    cached, failed = set(LogprobCache(output)), Path(f"{output}.failed.jsonl").read_text().count("\n")
    assert expected(50)[0] <= cached and len(cached) + failed == 50


def test_a_damaged_shard_stops_a_rerun_and_one_deleted_is_made_anew(tmp_path):
    output = tmp_path / "cache"
    stage(output, 100)
    path = sorted(output.glob(PATTERN))[2]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"{path.name}: damaged"):
        stage(output, 100)
    path.unlink()
    stage(output, 100)
    assert accounted(output) == expected(100)


def test_an_interrupted_write_leaves_no_shard_and_its_rest_is_cleared(tmp_path):
    output = tmp_path / "cache"
    stage(output, 30)
    part = output / PATTERN.replace("*", "00099")
    part = part.with_name(part.name + ".part")
    part.write_bytes(b"torn")
    assert accounted(output) == expected(30)
    stage(output, 60)
    assert accounted(output) == expected(60) and not part.exists()


def test_rows_gathered_when_the_run_ends_early_are_written(tmp_path):
    class Dying(ScriptedEngine):
        def collect(self):
            if self.asked > 30:
                raise KeyboardInterrupt
            return super().collect()

    output = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        stage(output, 100, shard_tokens=10**6, engine=Dying())
    assert len(LogprobCache(output)) > 15
    stage(output, 100)
    assert accounted(output) == expected(100)


def test_killed_at_any_moment_a_rerun_ends_with_every_row_once(tmp_path):
    output, rng, kills = tmp_path / "cache", random.Random(3), 0
    for _ in range(6):
        child = start("stage", output, 4000)
        child.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.4))
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 4 and sorted(output.glob(PATTERN))
    cached, failed = accounted(output)
    assert cached <= expected(4000)[0] and failed <= expected(4000)[1]
    stage(output, 4000)
    assert accounted(output) == expected(4000)


def test_two_runs_on_one_cache_at_once_are_refused(tmp_path):
    output = tmp_path / "cache"
    child = start("hold", output)
    child.stdout.readline()
    try:
        with pytest.raises(InputError, match="another command is writing"):
            stage(output, 10)
    finally:
        child.kill()
        child.wait()
    stage(output, 10)


# What follows runs in a process of its own: python test_logprob_cache.py <command> ...


def start(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=environment, stdout=subprocess.PIPE)


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(command: str, output: str, *arguments: str) -> None:
    if command == "hold":
        files = ShardFiles(Path(output), CacheInfo(8, 300, "m", "t"), 60)
        files.lock()
        print("holding", flush=True)
        time.sleep(60)
    elif command == "stage":
        print("started", flush=True)
        stage(Path(output), int(arguments[0]), shard_tokens=200)
    elif command == "memory":
        before = private_bytes()
        cache = LogprobCache(output)
        _ = cache["4000"]
        print(private_bytes() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
