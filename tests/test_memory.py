"""Where a GPU's memory ends, one line says for what there was none, and which flags need less."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_fixtures import build_model, build_tokenizer
from torch import nn
from train_fixtures import pair_rows, tiny_model, write_rows

from distiller.records import InputError
from RewardTrainer import memory
from RewardTrainer.eval.engines.hf import Scorer

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_without_memory_ends_with_the_step_its_tokens_and_the_flags_that_help(tmp_path, ranks):
    student, teacher = tiny_model(tmp_path / "student"), tiny_model(tmp_path / "teacher", hidden=48, seed=1)
    rows = write_rows(tmp_path / "scored.jsonl", pair_rows(40))
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command += [REPOSITORY / "tests/oom_driver.py", 3, "--config", "configs/train/example.yaml", "--eval_ratio", 0]
    command += [
        "--model_name_or_path",
        student,
        "--teacher_model",
        teacher,
        "--train_file",
        rows,
        "--output_dir",
        tmp_path,
    ]
    command += ["--save_strategy", "no", "--per_device_train_batch_size", 4, "--max_tokens_per_batch", 4096]
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY / "RewardTrainer",
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    said = next(line for line in done.stderr.splitlines() if "error: " in line)  # perhaps behind a progress bar
    assert "error: out of memory: step 3, a forward and backward pass of 4 pairs, " in said
    assert re.search(r"--max_tokens_per_batch \d+ \(the result is the same\), --gradient_checkpointing true", said)
    assert "--teacher_logprobs in place of the teacher" in said
    assert "Traceback (most recent call last)" not in done.stderr or ranks > 1  # the launcher's own


def test_evaluation_without_memory_says_which_batch_and_which_flags_help():
    tokenizer = build_tokenizer()
    scorer = Scorer(build_model(tokenizer), tokenizer)
    chats = [[[{"role": "user", "content": "tin"}, {"role": "assistant", "content": text}] for text in ("a", "b")]]
    encoded = scorer.encode(chats)

    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    scorer.model.base_model.register_forward_pre_hook(no_memory)
    with pytest.raises(InputError, match=r"a batch of 1 rows, \d+ tokens \(CUDA out of memory\).*--tokens_per_batch"):
        list(scorer.score(encoded))


def test_weights_count_once_and_in_their_own_size():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False).bfloat16(), nn.Linear(1024, 1024, bias=False))
    assert memory.weights_gib(model) == (2 + 4) * 2**20 / 2**30
    model[1].weight = model[0].weight
    assert memory.weights_gib(model) == 2 * 2**20 / 2**30


def test_memory_of_a_gpu_is_said_with_its_end(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    assert memory.memory_of(torch.device("cuda")) == "70.0 of 80.0 GiB are taken"
    with (
        pytest.raises(
            InputError, match=r"out of memory: the teacher \(CUDA out of memory; 70.0 of 80.0 GiB .*\). Buy"
        ),
        memory.memory_for("the teacher", "Buy some.", torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
