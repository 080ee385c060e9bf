"""`eval_rm.sh` end to end, and the report it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval_fixtures import build_model, build_tokenizer, pair, save_reward_model, styled, write_jsonl

from distiller.arguments import parse_stage_args
from distiller.records import InputError
from RewardTrainer.eval.benchmarks import example, preference
from RewardTrainer.eval.engines.hf import Scorer
from RewardTrainer.eval.evaluation import evaluate
from RewardTrainer.eval.run_eval_rm import DEFAULT_CONFIG, EvalArguments, default_output_dir, run

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>alert('pwned')</script><img src=x onerror=alert(1)>"


def eval_rm(*flags: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = ["bash", ROOT / "RewardTrainer" / "scripts" / "eval_rm.sh", *flags]
    return subprocess.run(
        [str(part) for part in command], cwd="/", env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A directory with a reward model, a benchmark and a preference file with bad rows in it."""
    house = tmp_path_factory.mktemp("house")
    (house / "benchmarks" / "example").mkdir(parents=True)
    save_reward_model(house / "reward_model")
    write_jsonl(house / "benchmarks" / "example" / "benchmark.jsonl", [styled(n) for n in range(5)])
    rows = [pair(n, margin=n / 2, subset="a" if n % 2 else "b") for n in range(8)]
    rows += [pair(8, rejected=""), "{broken", pair(9, prompt="q " * 400, chosen=HOSTILE, rejected=HOSTILE + "!")]
    write_jsonl(house / "pairs.jsonl", rows)
    return house


def test_the_script_scores_benchmark_and_preference_file_and_writes_what_it_promises(house):
    model, pairs, output = str(house / "reward_model"), str(house / "pairs.jsonl"), house / "out" / "deep"
    flags = ["--benchmarks", f"example,{pairs}", "--data_dir", house / "benchmarks", "--max_length", 256]
    done = eval_rm("--model", model, "--output_dir", output, *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == [
        "report.html",
        "results.json",
        "results.md",
        "scores.jsonl",
    ]

    results = json.loads((output / "results.json").read_text())
    assert results["model"] == model
    assert set(results) == {"model", "benchmarks", "counts", "settings"}
    assert results["settings"]["max_length"] == 256 and results["settings"]["data_dir"] == str(house / "benchmarks")
    assert set(results["benchmarks"]) == set(results["counts"]) == {"example", pairs}
    parts = {"subsets", "averages", "overall", "intervals"}
    assert all(set(benchmark) == parts for benchmark in results["benchmarks"].values())
    counts = results["counts"][pairs]
    assert len(counts.pop("skipped_rows")) == 2
    expected = {"rows": 11, "scored": 9, "counted": 9, "skipped": 2, "responses": 18, "empty_responses": 0}
    expected |= {"truncated": 2, "responses_cut": 0, "pairs": 9, "short_subsets": {}}
    assert counts == {**expected, "tied_pairs": counts["tied_pairs"]}
    assert "line 9: field `rejected` is empty" in done.stderr
    assert "2 conversations longer than 256 tokens" in done.stderr
    assert f"{model}: prompts shared, segments attention; tried: " in done.stderr

    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 6 + 18
    assert set(lines[0]) == {"benchmark", "id", "subset", "response", "score"}
    rewards = {(line["benchmark"], line["id"], line["response"]): line["score"] for line in lines}

    def wins(name: str, row: str, right: int, wrong: int) -> bool:
        return rewards[name, row, right] > rewards[name, row, wrong]

    right_in_a = sum(wins(pairs, f"row{n}", 0, 1) for n in (1, 3, 5, 7))
    assert results["benchmarks"][pairs]["subsets"]["a"] == {"accuracy": right_in_a / 4, "n": 4}
    normal = [wins("example", str(n), style, style + 3) for n in range(5) for style in range(3)]
    assert results["benchmarks"]["example"]["averages"]["normal"] == pytest.approx(sum(normal) / 15)

    table = done.stdout.splitlines()
    assert table[0] == "example: 5 of 5 rows, 45 pairs"
    assert table[1].split() == ["Easy", "Normal", "Hard", "Mean"]
    averages = results["benchmarks"]["example"]["averages"]
    assert table[2].split() == [f"{averages[name]:.3f}" for name in ("easy", "normal", "hard", "mean")]
    assert f"{pairs}: 9 of 11 rows, 9 pairs" in table


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "../output/nothing"], "error: ../output/nothing: no such directory"),
        (["--benchmarks", "rewardbench9"], "error: --benchmarks rewardbench9"),
        (["--benchmarks", "example,example"], "different names"),
        (["--benchmarks", f"{example.EMBEDDED},{os.path.relpath(example.EMBEDDED)}"], "different names"),
        (["--data_dir", "../nowhere"], "no such directory"),
        (["--dtype", "int4"], "--dtype int4"),
        (["--tokens_per_batch", "0"], "--tokens_per_batch 0: must be at least 1"),
        (["--attn_implementation", "egaer"], "--attn_implementation egaer: not one of eager, "),
        (["--model", "owner/none"], "error: owner/none is no directory here"),
        (["--max_length", "100000"], "takes 1 to 512 tokens"),
    ],
)
def test_a_wrong_request_ends_with_one_clear_line_and_writes_nothing(house, tmp_path, monkeypatch, flags, words):
    arguments = {"model": str(house / "reward_model"), "data_dir": str(house / "benchmarks")}
    arguments |= {"benchmarks": "example", "output_dir": str(tmp_path / "out")}
    given = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    given |= {name: int(given[name]) for name in ("max_length", "tokens_per_batch") if name in given}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as refusal:
        run(EvalArguments(**{**arguments, **given}))
    assert words in f"error: {refusal.value}"
    assert not (tmp_path / "out").exists()


def test_an_error_reaches_the_shell_without_a_traceback(house):
    done = eval_rm("--model", house / "reward_model", "--benchmarks", "no_such_benchmark")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --benchmarks no_such_benchmark")
    assert "Traceback" not in done.stderr


def test_a_file_whose_rows_are_all_refused_by_the_template_is_an_error(tmp_path):
    tokenizer = build_tokenizer("{{ raise_exception('never') }}")
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", [pair(0), pair(1)]))
    with pytest.raises(InputError, match="no row can be scored"):
        evaluate(benchmark, Scorer(build_model(tokenizer), tokenizer))


def test_a_row_the_template_refuses_is_skipped_and_no_score_moves_to_another_row(tmp_path):
    tokenizer = build_tokenizer()
    template = tokenizer.chat_template
    model = build_model(tokenizer)
    rows = [pair(n) for n in range(4)]
    whole = evaluate(preference.load(write_jsonl(tmp_path / "whole.jsonl", rows)), Scorer(model, tokenizer))
    rows[1]["prompt"] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    )
    partial = evaluate(preference.load(write_jsonl(tmp_path / "partial.jsonl", rows)), Scorer(model, tokenizer))
    assert [item.id for item in partial.items] == ["row0", "row2", "row3"]
    for row, number in zip(partial.scores, (0, 2, 3), strict=True):
        assert row == pytest.approx(whole.scores[number], abs=1e-5)
    assert partial.counts["skipped"] == 1
    assert "id row1" in partial.counts["skipped_rows"][0] and "no system" in partial.counts["skipped_rows"][0]


def test_bare_command_means_the_embedded_example_and_flags_override_it():
    bare = parse_stage_args(EvalArguments, DEFAULT_CONFIG, argv=[])
    assert bare == EvalArguments(model="../output/distilrm", benchmarks="example")
    assert example.EMBEDDED == ROOT / "examples" / "data" / "benchmark.jsonl"
    mine = parse_stage_args(EvalArguments, DEFAULT_CONFIG, argv=["--model", "org/rm", "--max_length", "7"])
    assert mine == EvalArguments(model="org/rm", benchmarks="example", max_length=7)


def test_output_directory_is_named_after_the_model_and_a_checkpoint_after_its_run_too(tmp_path):
    assert default_output_dir("org/reward-model") == Path("../output/eval/reward-model")
    assert default_output_dir("../output/distilrm/") == Path("../output/eval/distilrm")
    assert default_output_dir("../output/distilrm/checkpoint-50") == Path("../output/eval/distilrm-checkpoint-50")
