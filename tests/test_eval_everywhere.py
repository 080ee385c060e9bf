"""A saved reward model gives the same rewards wherever it is loaded: eval_rm.sh with both engines, the transformers
pipeline, vLLM's own pooling, TRL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from eval_fixtures import build_model, build_tokenizer, write_jsonl
from train_fixtures import tiny_model
from transformers import AutoTokenizer, pipeline

from RewardTrainer.eval.engines.hf import load_scorer
from RewardTrainer.train.checkpoint import load_student, load_tokenizer, save_student

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600
ANSWERS = ["iron", "The metal is iron, and the river is blue.", "green " * 40, "名前 é\n\n# Notes", "paper"]
KIND = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
ROWS = [
    {"id": str(n), "prompt": prompt, "chosen": ANSWERS[n % 5], "rejected": ANSWERS[(n + 2) % 5]}
    for n, prompt in enumerate(["Which metal?", "Name it. " * 20, KIND] * 3)
]
CHATS = [
    [
        *(row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]),
        {"role": "assistant", "content": row[name]},
    ]
    for row in ROWS
    for name in ("chosen", "rejected")
]


def export(directory: Path, head: str) -> Path:
    """A student of random weights, saved as training saves it."""
    base = tiny_model(directory / "base", hidden=128)  # head size 32, the smallest that vLLM takes on a CPU
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(5)
    student = load_student(str(base), tokenizer, head=head)
    with torch.no_grad():
        for parameter in student.score.parameters():
            parameter.normal_(std=0.5)
    save_student(student, tokenizer, directory / head)
    return directory / head


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("everywhere"), "linear")


@pytest.fixture(scope="module")
def rewards(model) -> list[float]:
    """Of `CHATS`, by our own engine in fp32."""
    return own_rewards(model)


def own_rewards(path: Path, **options) -> list[float]:
    scorer = load_scorer(str(path), dtype="float32", **options)
    found = [reward for _, _, reward in sorted(scorer.score(scorer.encode([[chat] for chat in CHATS])))]
    assert max(found) - min(found) > 0.1  # or agreement would mean nothing
    return found


def eval_rm(path: Path, output: Path, *flags: str) -> list[float]:
    """Rewards of `CHATS` in the scores.jsonl of eval_rm.sh."""
    pairs = write_jsonl(output.with_suffix(".jsonl"), ROWS)
    command = ["bash", ROOT / "RewardTrainer/scripts/eval_rm.sh", "--model", path, "--benchmarks", pairs]
    command += ["--output_dir", output, "--dtype", "float32", *flags]
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert [(line["id"], line["response"]) for line in lines] == [(row["id"], n) for row in ROWS for n in (0, 1)]
    return [line["score"] for line in lines]


def test_the_transformers_pipeline_gives_our_rewards(model, rewards):
    classify = pipeline("text-classification", model=str(model), function_to_apply="none", device="cpu")
    texts = [classify.tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    for side in ("left", "right"):
        classify.tokenizer.padding_side = side
        found = classify(texts, batch_size=4)
        assert [row["score"] for row in found] == pytest.approx(rewards, abs=1e-4)


def test_eval_rm_with_the_hf_engine_writes_our_rewards(model, rewards, tmp_path):
    assert eval_rm(model, tmp_path / "hf") == pytest.approx(rewards, abs=1e-5)


@pytest.mark.slow
def test_trl_rewards_its_completions_as_we_do(model, tiny_teacher, tmp_path):
    """GRPO with the saved model's path in `reward_funcs` logs the mean reward of the completions it made."""
    from trl import GRPOConfig, GRPOTrainer

    seen: list[list[dict]] = []

    def write_down(prompts, completions, **columns) -> list[float]:
        seen.extend([*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    args = GRPOConfig(
        output_dir=str(tmp_path / "grpo"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=1,
    )
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in ROWS if isinstance(row["prompt"], str)]
    trainer = GRPOTrainer(
        model=str(tiny_teacher),
        reward_funcs=[str(model), write_down],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    trainer.train()
    name = f"rewards/{model.name}/mean"
    (logged,) = [entry[name] for entry in trainer.state.log_history if name in entry]
    scorer = load_scorer(str(model), dtype="float32")
    ours = [reward for _, _, reward in scorer.score(scorer.encode([[chat] for chat in seen]))]
    assert len(ours) == 4
    assert logged == pytest.approx(sum(ours) / 4, abs=1e-4)


@pytest.mark.slow
def test_vllm_pooling_gives_our_rewards_with_no_code_of_ours(model, rewards, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [list(tokenizer.apply_chat_template(chat)["input_ids"]) for chat in CHATS]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    command = [sys.executable, ROOT / "tests/pooling_driver.py", model, tmp_path / "ids.json", tmp_path / "out.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == pytest.approx(rewards, abs=1e-4)


@pytest.mark.slow
def test_eval_rm_with_the_vllm_engine_writes_our_rewards(model, rewards, tmp_path):
    assert eval_rm(model, tmp_path / "vllm", "--engine", "vllm") == pytest.approx(rewards, abs=1e-4)


@pytest.mark.slow
def test_the_vllm_engine_cuts_long_conversations_where_ours_does(model, tmp_path):
    limit = ("--max_length", "40")
    expected = eval_rm(model, tmp_path / "hf", *limit)
    assert eval_rm(model, tmp_path / "vllm", "--engine", "vllm", *limit) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_vllm_engine_takes_the_reward_before_the_sigmoid_where_the_config_does_not_say_regression(tmp_path):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=64)
    model.config.problem_type = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    expected = own_rewards(tmp_path / "rm")
    assert not all(0 < reward < 1 for reward in expected)
    assert eval_rm(tmp_path / "rm", tmp_path / "vllm", "--engine", "vllm") == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_vllm_engine_pools_an_mlp_head_at_the_last_token(tmp_path):
    path = export(tmp_path, "mlp")
    expected = own_rewards(path, trust_remote_code=True)
    flags = ("--engine", "vllm", "--trust_remote_code", "true")
    assert eval_rm(path, tmp_path / "vllm", *flags) == pytest.approx(expected, rel=1e-5, abs=1e-4)  # rewards of 137
