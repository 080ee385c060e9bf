"""The caching command on real vLLM, against transformers, and against the tokens training makes of the same row."""

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

import numpy as np
import pytest
import torch
from test_train_data import GEMMA, LLAMA, THINKING, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distiller.logprob_cache import PATTERN, LogprobCache, TokenLogprobs
from refine.cache_teacher_logprobs_vllm import CacheArguments, main, make_work
from RewardTrainer.train.data import encode_pair

ROOT = Path(__file__).parents[1]
COMMAND = "refine/cache_teacher_logprobs_vllm.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TEACHER = ROOT / "examples/teacher"
TEMPLATES = {  # chat template and BOS, with names of what `make_tokenizer` knows
    "chatml": (THINKING, None),
    "llama": (LLAMA, "<|begin_of_text|>"),
    "gemma": (GEMMA, "<bos>"),
}
TOP_K = 64
LONG, MISSING = "long", "missing"  # ids of rows that cannot be cached

ODD = [
    {"prompt": "the question", "teacher_response": "the colour is red\n\n"},
    {"prompt": "the <|im_end|> question", "teacher_response": "<|im_end|> <|eot_id|> <end_of_turn>\n<bos> is text"},
    {"prompt": "café 你好", "teacher_response": "  \u0645\u0631 x"},
    {
        "prompt": [
            {"role": "user", "content": "the question"},
            {"role": "assistant", "content": "the metal"},
            {"role": "user", "content": "answer"},
        ],
        "teacher_response": [{"role": "assistant", "content": "x"}],
    },
    {
        "prompt": [{"role": "system", "content": "system"}, {"role": "user", "content": "the question"}],
        "teacher_response": "the metal is copper",
    },
]
SYSTEM = "odd-4"  # the id of the last one: a Gemma template refuses it
ODD = [{"id": f"odd-{n}", "chosen": "a", "rejected": "b", **row} for n, row in enumerate(ODD)]


def example_rows(count: int) -> list[dict]:
    """Rows of the embedded world; their responses are right, wrong and of all three styles."""
    rows = []
    for n, line in enumerate((ROOT / "examples/data/pairs.jsonl").read_text().splitlines()[:count]):
        row = json.loads(line)
        rows.append(row | {"teacher_response": row["rejected" if n % 3 else "chosen"]})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(source: Path, output: Path, *more: object) -> list[str]:
    return [str(part) for part in ("--input", source, "--output", output, *more)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model for each kind of chat template, and the embedded teacher."""
    found = {"example": TEACHER}
    for shape, (template, bos) in TEMPLATES.items():
        found[shape] = tmp_path_factory.mktemp("models") / shape
        tokenizer = make_tokenizer(shape, template, bos)
        tokenizer.save_pretrained(found[shape])
        config = LlamaConfig(  # transformers takes the tokenizer of a Llama as it is, with the BOS it adds to any text
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(found[shape])
    return found


@pytest.fixture(scope="module")
def caches(models, tmp_path_factory) -> dict[str, Path]:
    """The command run on each model: {name: output}."""
    directory = tmp_path_factory.mktemp("caches")
    bad = [
        {"id": LONG, "prompt": "Notes", "teacher_response": "size deep " * 600},
        {"id": MISSING, "prompt": "Notes"},
    ]
    rows = {"example": example_rows(60) + bad} | dict.fromkeys(TEMPLATES, ODD)
    outputs = {name: directory / name for name in rows}
    jobs = [
        flags(
            write(directory / f"{name}.jsonl", rows[name]),
            outputs[name],
            *("--model", models[name], "--student_model", models[name], "--max_model_len", 512),
            *("--top_k_logprobs", TOP_K, "--shard_tokens", 500, "--max_failure_rate", 0.5),
        )
        for name in rows
    ]
    # The same rows once more, in a context too short for most of them and then in one long enough.
    outputs["lengthened"] = directory / "lengthened"
    both = ("--model", models["chatml"], "--student_model", models["chatml"])
    retried = flags(directory / "chatml.jsonl", outputs["lengthened"], *both)
    jobs += [[*retried, "--max_model_len", "40", "--max_failure_rate", "1"]]
    jobs += [[*retried, "--max_model_len", "512", "--retry_failed"]]
    (directory / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "tests/cache_driver.py", str(directory / "jobs.json")],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(jobs), done.stderr[-4000:]
    assert "cover a probability mass of" in done.stderr and "bytes a token" in done.stderr
    return outputs


def failed(output: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in Path(f"{output}.failed.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def teacher_side(row: dict, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(prompt ids, response ids) of the live teacher's sequence in training."""
    pair = encode_pair(row, tokenizer, tokenizer, "teacher_response")
    ids, start = pair["teacher_input_ids"], pair["teacher_response_start"]
    return ids[:start], ids[start:]


@pytest.mark.parametrize("name", ["example", *TEMPLATES])
def test_log_probabilities_are_those_of_transformers_at_the_positions_training_reads(name, models, caches):
    rows = example_rows(60) if name == "example" else ODD
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
    assert name in ("example", "chatml") or tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    cache, masses = LogprobCache(caches[name]), []
    for row in rows:
        if row["id"] not in cache:
            assert name == "gemma" and row["id"] == SYSTEM
            continue
        prompt, response = teacher_side(row, tokenizer)
        cache.check(row["id"], response, prompt)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        whole = logits.double().log_softmax(-1).numpy()  # (n, V)
        masses.append(check_row(cache[row["id"]], whole, response))
    mass, coverage = np.concatenate(masses), cache.coverage()
    assert coverage.tokens == len(mass) and coverage.mean == pytest.approx(mass.mean(), abs=1e-4)
    for percent, least in coverage.percentiles.items():
        assert least == pytest.approx(np.percentile(mass, percent), abs=1e-3)


def check_row(cached: TokenLogprobs, whole: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Compare with the (n, V) log-probabilities of transformers; returns the mass of the top k, (n,)."""
    length, close = len(response), {"rtol": 1e-3, "atol": 1e-3}
    assert cached.top_ids.shape == (length, TOP_K) and (cached.token_ids == response).all()
    assert np.allclose(cached.token_logprobs, whole[np.arange(length), response], **close)
    assert np.allclose(cached.top_logprobs, np.take_along_axis(whole, cached.top_ids, -1), **close)
    # The ids are the most likely ones, in order; two as likely as each other may change places.
    best = -np.sort(-whole, axis=-1)[:, :TOP_K]
    assert np.allclose(cached.top_logprobs, best, **close)
    assert all(len(set(ids)) == TOP_K for ids in cached.top_ids.tolist())
    clear = np.diff(-best, axis=-1) > 1e-3  # (n, k - 1)
    clear = np.pad(clear, ((0, 0), (1, 0)), constant_values=True) & np.pad(clear, ((0, 0), (0, 1)))
    assert (cached.top_ids == np.argsort(-whole, axis=-1)[:, :TOP_K])[clear].all() and clear.mean() > 0.3
    mass = np.exp(best).sum(-1)
    assert np.allclose(1 - cached.tail, mass, atol=1e-3)
    return mass


def test_rows_that_cannot_be_cached_fail_alone_with_reason_and_remedy(caches):
    reasons = failed(caches["example"])
    assert set(reasons) == {LONG, MISSING} and len(LogprobCache(caches["example"])) == 60
    assert "max_model_len 512" in reasons[LONG]["reason"] and "--max_model_len" in reasons[LONG]["reason"]
    assert "`teacher_response` is missing" in reasons[MISSING]["reason"]
    assert "python refine/refine_response_vllm.py" in reasons[MISSING]["remedy"]
    assert set(failed(caches["gemma"])) == {SYSTEM} and "System role not supported" in str(failed(caches["gemma"]))
    assert failed(caches["chatml"]) == failed(caches["llama"]) == {}


def test_rows_too_long_are_cached_by_a_rerun_with_a_longer_context(caches):
    known, lengthened = LogprobCache(caches["chatml"]), LogprobCache(caches["lengthened"])
    assert set(known) == set(lengthened) and failed(caches["lengthened"]) == {}
    assert len(list(caches["lengthened"].glob(PATTERN))) == 2  # a shard of either run
    for identifier in known:
        a, b = known[identifier], lengthened[identifier]
        assert (a.token_ids == b.token_ids).all() and a.prompt_hash == b.prompt_hash
        assert np.allclose(a.token_logprobs, b.token_logprobs, rtol=2.0**-10)


def test_a_token_takes_at_most_400_bytes_on_disk_at_64_candidates(caches):
    tokens = LogprobCache(caches["example"]).coverage().tokens
    assert tokens > 1000
    assert sum(file.stat().st_size for file in caches["example"].iterdir()) / tokens <= 400


def test_the_manifest_says_what_the_cache_was_made_with(caches):
    manifest = json.loads(Path(f"{caches['example']}.manifest.json").read_text())
    assert manifest["model"] == str(TEACHER) and manifest["options"]["top_k_logprobs"] == TOP_K
    for name in ("model_files", "tokenizer", "response_tokenizer", "prompt", "end_of_turn"):
        assert manifest[name], name
    assert manifest["inputs"]["input"] and manifest["made_with"]["packages"]["transformers"]
    assert manifest["made_with"]["engine"]["vllm"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--top_k_logprobs", 8], "options.top_k_logprobs: 64 before, 8 now"),
        (["--dtype", "bfloat16"], "options.dtype"),
        (["--model", "chatml", "--student_model", "chatml"], "tokenizer: "),
    ],
)
def test_a_rerun_that_would_differ_is_refused(change, difference, models, caches, capsys):
    output = caches["example"]
    before = {path.name: path.read_bytes() for path in output.glob(PATTERN)}
    given = ["--model", TEACHER, "--student_model", TEACHER, "--top_k_logprobs", TOP_K, "--max_model_len", 512]
    change = [models.get(word, word) for word in change]
    assert main(flags(output.with_suffix(".jsonl"), output, *given, *change)) == 1
    assert difference in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.glob(PATTERN)} == before


def test_a_finished_cache_is_reported_again_without_loading_a_model(caches, capsys):
    output = caches["example"]
    given = ["--model", TEACHER, "--max_model_len", 512, "--max_failure_rate", 0.5]
    assert main(flags(output.with_suffix(".jsonl"), output, *given)) == 0
    told = capsys.readouterr().err
    assert "62 of 62 rows are finished already" in told
    assert str(LogprobCache(output).coverage()) in told


# ------------------------------------------------------------------------------------------------------- without vLLM


def cache_arguments(model: Path, **values) -> CacheArguments:
    return CacheArguments(input="in.jsonl", output="out", model=str(model), **values)


def tokenizer_only(directory: Path, tokenizer) -> Path:
    """Enough of a model for the command to make tokens with."""
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    return directory


def test_a_teacher_that_knows_more_tokens_is_asked_for_the_students(tmp_path):
    more = make_tokenizer("chatml", THINKING, extra=["<think>", "</think>"])
    teacher = tokenizer_only(tmp_path / "teacher", more)
    plain = make_tokenizer("chatml", THINKING.replace("<think>\n\n</think>\n\n", ""))
    student = tokenizer_only(tmp_path / "student", plain)
    row = ODD[0] | {"teacher_response": "think <think> x </think>"}
    pair = encode_pair(row, plain, more, "teacher_response")
    whole, start = pair["teacher_input_ids"].tolist(), pair["teacher_response_start"]
    ask = next(make_work(cache_arguments(teacher, student_model=str(student)))(row))
    assert (ask.prompt_ids, ask.response_ids) == (whole[:start], whole[start:])
    ask = next(make_work(cache_arguments(teacher))(row))
    assert ask.prompt_ids == whole[:start] and ask.response_ids != whole[start:]


def test_a_student_of_another_vocabulary_is_refused(models, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ODD)
    given = ["--model", TEACHER, "--student_model", models["llama"]]
    assert main(flags(source, tmp_path / "out", *given)) == 1
    assert "of its tokens are not the teacher's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Which?", "chosen": "a", "rejected": "b"}, "python refine/refine_response_vllm.py"),
        ({"teacher_response": "a"}, "`prompt` is missing"),
    ],
)
def test_input_that_does_not_fit_names_field_and_command(row, message, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [row])
    assert main(flags(source, tmp_path / "out", "--model", TEACHER)) == 1
    told = capsys.readouterr().err
    assert message in told and "in.jsonl, line 1" in told
    assert not (tmp_path / "out").exists()


def test_a_missing_input_names_the_command_that_makes_it(tmp_path, capsys):
    assert main(flags(tmp_path / "none.jsonl", tmp_path / "out", "--model", TEACHER)) == 1
    assert "python score/cali_score_vllm.py" in capsys.readouterr().err


def test_an_output_that_holds_something_else_is_refused(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ODD)
    for place, message in ((source.with_suffix(".txt"), "is a file"), (tmp_path, "other things in it")):
        if place != tmp_path:
            place.write_text("mine")
        assert main(flags(source, place, "--model", TEACHER)) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.txt"]


def test_more_candidates_than_tokens_are_refused(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ODD)
    assert main(flags(source, tmp_path / "out", "--model", TEACHER, "--top_k_logprobs", 1000)) == 1
    assert "knows 896 tokens only" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--temperature=1", "--base_url=http://localhost", "--seed=1", "--num_engines=2"])
def test_flags_that_would_do_nothing_are_not_taken(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags(tmp_path / "in.jsonl", tmp_path / "out", flag))
    assert stop.value.code == 2 and "unknown argument" in capsys.readouterr().err


def test_a_dry_run_shows_prompt_and_response_and_writes_nothing(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", example_rows(5))
    assert main(flags(source, tmp_path / "out", "--model", TEACHER, "--dry_run")) == 0
    told = capsys.readouterr().out
    assert "rows: 5" in told and example_rows(1)[0]["teacher_response"] in told
    assert list(tmp_path.iterdir()) == [source]


# ------------------------------------------------------------------------------------------------------------- kill -9


def shards(output: Path) -> int:
    return len(list(output.glob(PATTERN)))


def kill_after(count: int, command: list[str], output: Path, log: Path) -> None:
    """Start the command and `kill -9` it once that many more shards are there."""
    wanted = shards(output) + count
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 600
        while shards(output) < wanted:
            assert process.poll() is None, f"ended before it could be killed:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_three_times_the_cache_equals_that_of_an_undisturbed_run(tmp_path):
    rows = example_rows(400) + [{"id": LONG, "prompt": "Notes", "teacher_response": "size deep " * 600}]
    source, rng = write(tmp_path / "in.jsonl", rows), random.Random(7)
    more = ["--model", TEACHER, "--max_model_len", 512, "--max_num_seqs", 8, "--shard_tokens", 200]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, COMMAND, *flags(source, killed, *more)]
    for _ in range(3):
        kill_after(rng.randint(1, 8), command, killed, tmp_path / "log")
        assert set(LogprobCache(killed)) < {row["id"] for row in rows}
    for output in (killed, whole):
        last = [sys.executable, COMMAND, *flags(source, output, *more)]
        done = subprocess.run(last, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        cache = LogprobCache(output)  # refuses an id that is there twice
        assert set(cache) == {row["id"] for row in rows[:-1]} and set(failed(output)) == {LONG}
    assert not list(killed.glob("*.part"))
    caches = [LogprobCache(output) for output in (killed, whole)]
    for row in rows[:-1]:
        a, b = (cache[row["id"]] for cache in caches)
        assert (a.token_ids == b.token_ids).all() and a.prompt_hash == b.prompt_hash
        # What else was in the batch moves the last bits of a log-probability, and so which of two is rounded up.
        for name in ("token_logprobs", "top_logprobs"):
            assert np.allclose(getattr(a, name), getattr(b, name), rtol=2.0**-10, atol=1e-6)
        assert np.allclose(a.tail, b.tail, rtol=2.0**-10, atol=1e-6)
        assert (a.top_ids == b.top_ids).mean() > 0.99
