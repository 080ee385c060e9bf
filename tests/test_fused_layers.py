"""Fused layers are taken where they can be had, and never where they change what a model computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packing_fixtures import MODELS, build
from train_fixtures import pair_rows, tiny_model, write_rows

from distiller.records import InputError
from RewardTrainer import fused_layers
from RewardTrainer.packing_trial import padded_states, trial_rows

REPOSITORY = Path(__file__).resolve().parents[1]


def test_on_a_cpu_the_models_own_layers_stay_and_the_log_says_why():
    assert fused_layers.use_fused_layers(build(MODELS["qwen2"]), torch.device("cpu")) == (
        "the model's own layers (liger-kernel needs a GPU)"
    )


def test_layers_that_compute_something_else_are_refused_and_those_that_only_round_otherwise_are_not(monkeypatch):
    def replace_norms(by: float):
        def apply(model, config):
            assert not config["cross_entropy"] and not config["fused_linear_cross_entropy"]
            for layer in model.layers:
                stock = layer.input_layernorm.forward
                layer.input_layernorm.forward = lambda hidden, stock=stock: (
                    stock(hidden.double()).to(hidden.dtype) * by
                )

        return apply

    monkeypatch.setattr(fused_layers, "_why_not", lambda backbone, device: None)  # as on a GPU
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(fused_layers, "apply_liger_kernel", replace_norms(by=1.0))
        model = build(MODELS["qwen2"]).to(dtype).train()
        assert "from the model's own" in fused_layers.use_fused_layers(model, torch.device("cpu"))
        assert model.training
        monkeypatch.setattr(fused_layers, "apply_liger_kernel", replace_norms(by=1.3))
        model, rows = build(MODELS["qwen2"]).to(dtype), trial_rows(97)
        with torch.no_grad():
            own = padded_states(model, rows)
            said = fused_layers.use_fused_layers(model, torch.device("cpu"))
            assert said.startswith("the model's own layers (liger-kernel changes what Qwen2Model computes")
            for before, after in zip(own, padded_states(model, rows), strict=True):
                assert torch.equal(before, after)
        with pytest.raises(InputError, match="--use_liger_kernel: .*changes what Qwen2Model.*train without it"):
            fused_layers.use_fused_layers(model, torch.device("cpu"), wanted=True)


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_fused_layers_that_are_asked_for_on_a_cpu_end_training_with_a_line_that_says_what_to_do(tmp_path, wanted):
    student = tiny_model(tmp_path / "student")
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    command = [
        sys.executable,
        "-m",
        "RewardTrainer.train.run_reward_train",
        "--config",
        "configs/train/example_bt.yaml",
    ]
    command += [
        "--model_name_or_path",
        student,
        "--train_file",
        rows,
        "--output_dir",
        tmp_path / "rm",
        "--max_steps",
        "1",
    ]
    command += ["--eval_ratio", "0", "--use_liger_kernel", wanted]
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY / "RewardTrainer",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if wanted == "true":
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "error: --use_liger_kernel: liger-kernel needs a GPU; train without it"
    else:
        assert done.returncode == 0, done.stderr
        assert "student: the model's own layers, as asked" in done.stderr
        assert "student: layout shared_prefix, segments attention; tried: " in done.stderr
