"""Where rewards lie: `--center_rewards_coefficient`, `--normalize_rewards`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import make_trainer, pair_rows, tiny_model, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distiller.records import InputError
from RewardTrainer.train import run_reward_train
from RewardTrainer.train.checkpoint import RewardScale, normalized
from RewardTrainer.train.losses import center_loss
from RewardTrainer.train.trainer import DistilTrainer

ONE_SGD_STEP = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0, "learning_rate": 1.0, "warmup_steps": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "student")


def test_centering_is_the_square_of_the_pair_s_sum_with_its_gradient():
    chosen = torch.tensor([1.0, -2.0], requires_grad=True)
    rejected = torch.tensor([0.5, 3.0], requires_grad=True)
    loss = center_loss(chosen, rejected)
    torch.testing.assert_close(loss, torch.tensor([2.25, 1.0]))
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(rejected.grad, torch.tensor([3.0, 2.0]))


def test_step_with_centering_adds_its_mean_over_all_pairs_of_the_step(model, tmp_path):
    def step(coefficient: float | None, **cut):
        settings = {"loss_type": "bt", "logging_steps": 1, "layout": "padded"}
        settings |= {"center_rewards_coefficient": coefficient, **ONE_SGD_STEP, **cut}
        trainer = make_trainer(model, tmp_path, pair_rows(7), **settings)
        before = trainer.model.score.weight.detach().clone()
        batch = trainer._prepare_inputs(trainer.collate(trainer.train_dataset))
        terms = trainer.pair_terms(trainer.model, batch)
        expected = 0.3 * ((terms["chosen"] + terms["rejected"]) ** 2).mean()
        (gradient,) = torch.autograd.grad(expected, trainer.model.score.weight)
        trainer.train()
        log = next(log for log in trainer.state.log_history if "loss" in log)
        return before - trainer.model.score.weight.detach(), gradient, expected.item(), log

    plain, gradient, expected, log = step(None, per_device_train_batch_size=7)
    assert "loss_center" not in log
    for cut in ((7, 1), (4, 2)):  # (4, 2): the second micro-batch has 3 pairs
        cut = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), cut, strict=True))
        centered, _, _, with_term = step(0.3, **cut)
        torch.testing.assert_close(centered - plain, gradient, rtol=1e-4, atol=1e-5)
        assert with_term["loss"] == pytest.approx(log["loss"] + expected, rel=1e-4)
        assert 0.3 * with_term["loss_center"] == pytest.approx(expected, rel=1e-4)


def test_centering_of_absolute_scores_and_negative_coefficients_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="steerlm"):
        make_trainer(model, tmp_path, pair_rows(4), loss_type="steerlm", center_rewards_coefficient=0.1)
    with pytest.raises(InputError, match="0 or above"):
        make_trainer(model, tmp_path, pair_rows(4), loss_type="bt", center_rewards_coefficient=-0.1)


def train(model: Path, output: Path, *extra: str) -> list[dict]:
    """Two steps; returns the rows."""
    rows = pair_rows(12)
    arguments = [
        "--model_name_or_path",
        str(model),
        "--train_file",
        str(write_rows(output.with_suffix(".jsonl"), rows)),
    ]
    arguments += ["--output_dir", str(output), "--loss_type", "margin_regression", "--max_steps", "2"]
    arguments += ["--teacher_model", str(model), "--sft_weight", "0", "--kl_weight", "0", "--eval_ratio", "0"]
    run_reward_train.main([*arguments, "--disable_tqdm", "true", *extra])
    return rows


def rewards_of(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """(rows, 2): chosen, rejected, each conversation alone."""
    rewards = []
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt").input_ids
            with torch.no_grad():
                rewards.append(model.eval()(input_ids=ids).logits.item())
    return torch.tensor(rewards).view(-1, 2)


def exported_rewards(output: Path, rows: list[dict], head: str = "linear"):
    exported = AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=head == "mlp")
    return exported.config, rewards_of(exported, AutoTokenizer.from_pretrained(output), rows)


def test_exported_config_has_the_mean_and_deviation_of_the_exported_model_s_rewards(model, tmp_path):
    rows = train(model, tmp_path / "out")
    config, rewards = exported_rewards(tmp_path / "out", rows)
    assert config.reward_mean == pytest.approx(rewards.mean().item(), abs=1e-3)
    assert config.reward_std == pytest.approx(rewards.std(correction=0).item(), rel=1e-2)


def test_a_run_that_begins_from_a_reward_model_does_not_pass_its_scale_on(model, tmp_path):
    train(model, tmp_path / "first")
    train(tmp_path / "first", tmp_path / "second", "--save_strategy", "steps", "--save_steps", "1")
    configs = [path.read_text() for path in (tmp_path / "second").glob("checkpoint-*/config.json")]
    assert configs and not any("reward_mean" in config for config in configs)
    assert "reward_mean" in (tmp_path / "second/config.json").read_text()


def test_model_is_on_disk_even_where_its_rewards_cannot_be_measured(model, tmp_path, monkeypatch):
    train(model, tmp_path / "out", "--max_steps", "1")
    earlier = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(DistilTrainer, "measure_rewards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, tmp_path / "out")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() != earlier
    for report in ("metrics.json", "README.md", "curves.png"):  # they told of the earlier model
        assert not (tmp_path / "out" / report).exists()


def test_a_model_whose_last_step_ruined_it_is_no_success(model, tmp_path):
    with pytest.raises(FloatingPointError, match="12 of 12 pairs have a reward that is not finite"):
        train(model, tmp_path / "out", "--max_steps", "1", "--learning_rate", "1e38", "--warmup_steps", "0")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_normalized_rewards_are_the_trained_ones_on_another_scale(model, tmp_path, head, lora):
    flags = ["--head", head, *(("--use_peft",) if lora else ())]
    rows = train(model, tmp_path / "plain", *flags)
    train(model, tmp_path / "normal", *flags, "--normalize_rewards")
    before, plain = exported_rewards(tmp_path / "plain", rows, head)
    after, normal = exported_rewards(tmp_path / "normal", rows, head)
    assert normal.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    # A stock linear head has no bias, so its rewards keep their mean.
    shift = plain.mean() if head == "mlp" else 0
    torch.testing.assert_close(normal, (plain - shift) / plain.std(correction=0), rtol=0, atol=1e-3)
    assert after.reward_mean == pytest.approx(normal.mean().item(), abs=1e-3) and after.reward_std == 1
    if lora:
        stored = load_file(tmp_path / "normal/adapter/adapter_model.safetensors")
        merged = load_file(tmp_path / "normal/model.safetensors")
        for name in merged:
            if name.startswith(("score", "classifier")):
                assert torch.equal(stored[f"base_model.model.{name}"], merged[name])

    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("plain", "normal")]
    trained = {"mean": before.reward_mean, "std": before.reward_std, "pairs": 12, "held_out": False}
    assert [one["rewards"] for one in metrics] == [
        pytest.approx(trained | {"normalized_in_export": told}) for told in (False, True)
    ]
    told = [(tmp_path / name / "README.md").read_text() for name in ("plain", "normal")]
    assert ["normalized after training" in card for card in told] == [False, True]


def test_metrics_are_in_the_scale_of_training(model, tmp_path):
    for name, flags in {"plain": (), "normal": ("--normalize_rewards",)}.items():
        train(model, tmp_path / name, "--eval_ratio", "0.3", *flags)
    plain, normal = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("plain", "normal"))
    for name in ("eval_accuracy", "eval_mean_gap", "eval_loss", "eval_gap_margin_slope"):
        assert plain["after"][name] == normal["after"][name]
    assert plain["calibration"] == normal["calibration"]


def test_rewards_that_are_all_the_same_are_left_alone():
    state = {"score.weight": torch.zeros(1, 4)}
    assert normalized(state, "linear", RewardScale(0.0, 0.0)) == (state, RewardScale(0.0, 0.0))
