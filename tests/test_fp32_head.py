"""The reward head is fp32 under DeepSpeed's bf16 too: its weights, what it computes with, and what is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_launch import launch
from train_fixtures import pair_rows, tiny_model, write_rows

from RewardTrainer.train.fp32_head import Float32Linear

# A step of 1e-4 times a gradient of order 1 is far under a bf16 unit of weights of 0.02 to 1.
STEPS = [
    "--bf16",
    "true",
    "--max_steps",
    "4",
    "--optim",
    "sgd",
    "--learning_rate",
    "1e-4",
    "--lr_scheduler_type",
    "constant",
]
STEPS += ["--warmup_steps", "0", "--save_steps", "2", "--eval_ratio", "0.1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "student", tied=False)
    tiny_model(root / "teacher", hidden=48, seed=1)
    write_rows(root / "scored.jsonl", pair_rows(60))
    return root


def test_a_layer_computes_with_its_masters_and_gives_its_parameters_the_gradient():
    torch.manual_seed(0)
    layer = Float32Linear(64, 1).to(torch.bfloat16)
    masters = {"weight": torch.randn(1, 64), "bias": torch.randn(1)}
    with torch.no_grad():
        for name, master in masters.items():
            getattr(layer, name).copy_(master)
    hidden = torch.randn(7, 64)
    layer.masters = masters
    with torch.autocast("cpu", torch.bfloat16):
        rewards = layer(hidden)
    assert torch.equal(rewards, torch.nn.functional.linear(hidden, masters["weight"], masters["bias"]))
    rewards.sum().backward()
    torch.testing.assert_close(layer.weight.grad.float(), hidden.sum(0)[None], rtol=1e-2, atol=1e-2)
    assert layer.bias.grad.item() == 7


def score(path) -> dict[str, torch.Tensor]:
    names = ("score", "classifier")
    return {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name.startswith(names)}


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "head"), [(1, "linear"), (2, "mlp"), (3, "linear"), (3, "mlp")])
def test_updates_below_a_bf16_unit_reach_the_head_and_its_export(world, zero, head):
    output = world / f"bf16-{zero}-{head}"
    launch(world, output, *STEPS, "--head", head, zero=zero)
    history = {step: score(output / f"checkpoint-{step}") for step in (2, 4)}
    exported = score(output)
    assert exported
    for name, after in exported.items():
        assert after.dtype == torch.float32
        assert torch.equal(after, history[4][name])
        if after.dim() == 2:
            assert (after != after.bfloat16().float()).float().mean() > 0.5, name  # bits that bf16 has not
            moved = (after - history[2][name]).abs()
            assert (moved > 0).float().mean() > 0.5, name
            assert moved.max() < after.abs().max() * 2**-9, name  # such a step bf16 weights would mostly not take
    # Held-out rewards come from those weights: many different values, and none that bf16 has made equal.
    assert json.loads((output / "metrics.json").read_text())["rewards"]["std"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_resumed_run_ends_with_the_head_of_an_uninterrupted_one(world, zero):
    whole, parts = world / f"whole-{zero}", world / f"parts-{zero}"
    launch(world, whole, *STEPS, zero=zero)
    # The same four steps: two, as if told to stop there, then the rest.
    launch(world, parts, *STEPS, "--save_total_limit", "5", zero=zero)
    shutil.rmtree(parts / "checkpoint-4")
    launch(world, parts, *STEPS, "--save_total_limit", "5", "--resume_from_checkpoint", "last", zero=zero)
    for name, tensor in score(whole).items():
        torch.testing.assert_close(score(parts)[name], tensor, rtol=0, atol=1e-8)
