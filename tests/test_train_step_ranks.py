"""The training step under sharded weights: two ranks against the loss as one would write it down, every gradient."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_launch import launch, logged
from test_train_step import FAMILIES, WEIGHTS, assert_same_gradients, plain_joint_loss
from train_fixtures import make_trainer, pair_rows, tiny_model, write_rows
from transformers import AutoModelForCausalLM

from RewardTrainer.train.checkpoint import load_student, load_tokenizer, read_weights, save_student

BUDGET = 250  # five of the short pairs fit at once, and the long one not even alone: ranks would take 1 and 2 forwards


def unequal_rows() -> list[dict]:
    rows = pair_rows(10)
    return [*rows[:9], {**rows[9], "chosen": "blue " * 280}]


def start(path: Path, teacher: Path, rows: list[dict], output: Path):
    """A saved student, so that its reward head is known: its trainer in this process, the plain loss, its gradients.

    They are named as in the checkpoint's files.
    """
    tokenizer = load_tokenizer(str(path))
    torch.manual_seed(5)
    student = load_student(str(path), tokenizer)
    save_student(student, tokenizer, output / "start", save_lm=True)
    trainer = make_trainer(output / "start", output, rows, teacher, **WEIGHTS)
    lm = AutoModelForCausalLM.from_pretrained(output / "start/lm").double()
    score = student.score.weight[0].detach().double().requires_grad_()
    reference = plain_joint_loss(lm, score, AutoModelForCausalLM.from_pretrained(teacher).double(), trainer)
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in lm.named_parameters()}
    return trainer, reference.item(), gradients | {"score.weight": score.grad[None]}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    own = path / "lm_head/model.safetensors"
    head = {f"lm_head.{name}": tensor for name, tensor in load_file(own).items()} if own.exists() else {}
    return {name: tensor.double() for name, tensor in (read_weights(path) | head).items()}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_step_under_zero3_with_unequal_micro_batches_is_the_plain_one(tmp_path, tied):
    path = tiny_model(tmp_path / "base", tied=tied, family="gemma2", **FAMILIES["gemma2"])
    teacher = tiny_model(tmp_path / "teacher", hidden=48, seed=1, vocab=400)
    rows = unequal_rows()
    write_rows(tmp_path / "scored.jsonl", rows)
    trainer, loss, gradients = start(path, teacher, rows, tmp_path)
    tokens = sorted(trainer.collate([pair])["input_ids"].numel() for pair in trainer.train_dataset)
    assert sum(tokens[4:9]) <= BUDGET < tokens[9], tokens

    output = tmp_path / "run"
    flags = {**WEIGHTS, "per_device_train_batch_size": 5, "max_tokens_per_batch": BUDGET, "max_steps": 1}
    flags |= {"optim": "sgd", "learning_rate": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    flags |= {"max_grad_norm": 0, "eval_ratio": 0, "gradient_checkpointing": "true", "logging_steps": 1}
    flags |= {"gradient_accumulation_steps": 1, "layout": "shared_prefix", "train_file": tmp_path / "scored.jsonl"}
    flags |= {"model_name_or_path": tmp_path / "start", "teacher_model": teacher, "output_dir": output}
    launch(tmp_path, output, *(str(part) for name, value in flags.items() for part in (f"--{name}", value)), zero=3)
    assert logged(output)[0]["loss"] == pytest.approx(loss, rel=1e-4)
    before, after = weights_of(tmp_path / "start"), weights_of(output)
    if tied:
        gradients.pop("lm_head.weight", None)
    assert_same_gradients({name: before[name] - after[name] for name in before}, gradients, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_step_under_fsdp_is_the_plain_one(tmp_path, version):
    path = tiny_model(tmp_path / "base")
    teacher = tiny_model(tmp_path / "teacher", hidden=48, seed=1, vocab=400)
    rows = pair_rows(6)
    _, loss, gradients = start(path, teacher, rows, tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [Path(__file__).parent / "fsdp_driver.py", version, tmp_path / "start", teacher, tmp_path / "rows.json"]
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ours = load_file(tmp_path / "out")
    assert ours.pop("loss").item() == pytest.approx(loss, rel=1e-5)
    ours = {name.replace("backbone.", "model."): gradient for name, gradient in ours.items()}
    assert_same_gradients(ours, gradients, atol=2e-5)
