"""The trainer: what is averaged, logged and evaluated, and that nothing depends on how the work was cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import make_trainer, pair_rows, tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from RewardTrainer.train.losses import LOSSES
from RewardTrainer.train.token_budget import TokenBudget
from RewardTrainer.train.trainer import DistilTrainer, last_checkpoint

ONE_SGD_STEP = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0, "learning_rate": 0.05, "warmup_steps": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny_model(root / "tied"),
        "untied": tiny_model(root / "untied", tied=False),
        "dropout": tiny_model(root / "dropout", attention_dropout=0.2),
        "teacher": tiny_model(root / "teacher", hidden=48, seed=1, vocab=400),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson of ranks, where a value's rank is how many are below it and half of how many equal it."""
    ranks = [[sum(y < x for y in v) + 0.5 * sum(y == x for y in v) for x in v] for v in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


def weights_of(trainer: DistilTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_step_is_the_same_however_its_pairs_are_cut_into_micro_batches(models, tmp_path):
    after = []
    # (4, 2): the second batch has 3 pairs. A budget of 60 tokens is a few pairs, one of 1 a pair at a time.
    for batch_size, accumulation, more in (
        (7, 1, {"layout": "padded"}),
        (4, 2, {}),
        (1, 7, {}),
        (7, 1, {"max_tokens_per_batch": 60}),
        (4, 2, {"max_tokens_per_batch": 1, "layout": "padding_free"}),
        (7, 1, {"max_tokens_per_batch": 300, "layout": "padded"}),
    ):
        trainer = make_trainer(
            models["tied"],
            tmp_path,
            pair_rows(7),
            models["teacher"],
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **ONE_SGD_STEP,
            **more,
        )
        before = weights_of(trainer)
        forwards = []
        trainer.model.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        trainer.train()
        assert (len(forwards) > accumulation) is ("max_tokens_per_batch" in more)
        assert not torch.equal(before["score.weight"], trainer.model.state_dict()["score.weight"])
        after.append((weights_of(trainer), trainer.state.log_history[-1]["train_loss"]))
    for weights, loss in after[1:]:
        assert_same_weights(after[0][0], weights, atol=2e-6)
        assert loss == pytest.approx(after[0][1], rel=1e-5)


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_every_loss_changes_every_parameter_it_should(models, tmp_path, loss_type, name):
    trainer = make_trainer(
        models[name], tmp_path, pair_rows(8), models["teacher"], loss_type=loss_type, max_steps=2, learning_rate=1e-3
    )
    before = weights_of(trainer)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    for parameter, tensor in trainer.model.state_dict().items():
        should = name == "tied" or parameter != "language_head.weight" or LOSSES[loss_type].generative is not None
        assert torch.equal(before[parameter], tensor) is not should, parameter
    # A parameter that no gradient reaches must be frozen, or DDP takes it for an error.
    frozen = [parameter for parameter, tensor in trainer.model.named_parameters() if not tensor.requires_grad]
    assert frozen == (["language_head.weight"] if name == "untied" and LOSSES[loss_type].generative is None else [])


def test_teacher_is_never_trained_nor_part_of_the_student(models, tmp_path):
    trainer = make_trainer(models["tied"], tmp_path, pair_rows(8), models["teacher"], max_steps=2, learning_rate=1e-2)
    before = {name: tensor.clone() for name, tensor in trainer.teacher.backbone.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.teacher.backbone.state_dict().items():
        assert torch.equal(before[name], tensor)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}
    assert not trained & {id(p) for p in trainer.teacher.backbone.parameters()}


def test_logged_terms_add_up_to_the_logged_loss(models, tmp_path):
    trainer = make_trainer(
        models["tied"],
        tmp_path,
        pair_rows(10),
        models["teacher"],
        logging_steps=2,
        reward_weight=0.5,
        sft_weight=2.0,
        kl_weight=3.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        total = 0.5 * log["loss_reward"] + 2.0 * log["loss_sft"] + 3.0 * log["loss_kl"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)
        assert 0 <= log["accuracy"] <= 1


def test_evaluation_counts_each_pair_once_whatever_the_batch_size(models, tmp_path):
    results, tables = [], []
    for batch_size, budget in ((1, None), (3, None), (7, None), (3, 80)):  # 3: the last batch has one pair
        trainer = make_trainer(
            models["tied"],
            tmp_path,
            pair_rows(4),
            models["teacher"],
            eval_rows=pair_rows(7, seed=5),
            per_device_eval_batch_size=batch_size,
            max_tokens_per_batch=budget,
        )
        metrics = trainer.evaluate()
        results.append({k: v for k, v in metrics.items() if k != "epoch" and "second" not in k and "time" not in k})
        tables.append(trainer.predict(trainer.eval_dataset).predictions)
    for other, table in zip(results[1:], tables[1:], strict=True):
        assert other == pytest.approx(results[0], rel=1e-4)
        assert table == pytest.approx(tables[0], rel=1e-4, abs=1e-4)  # in order: what ranks repeat is cut off the end
    batch = trainer._prepare_inputs(trainer.collate(trainer.eval_dataset))
    with torch.no_grad():
        terms = {name: tensor.double().numpy() for name, tensor in trainer.pair_terms(trainer.model, batch).items()}
    gap, margin = terms["chosen"] - terms["rejected"], terms["margin"]
    expected = {
        "eval_accuracy": (gap > 0).mean(),
        "eval_mean_gap": gap.mean(),
        "eval_gap_margin_pearson": np.corrcoef(gap, margin)[0, 1],
        "eval_gap_margin_spearman": spearman(gap, margin),
        "eval_gap_margin_slope": np.polyfit(margin, gap, 1)[0],
        "eval_nll": (terms["sft"] * terms["tokens"]).sum() / terms["tokens"].sum(),
        "eval_loss_reward": ((gap - margin) ** 2).mean(),
        "eval_loss_sft": terms["sft"].mean(),
        "eval_loss_kl": terms["kl"].mean(),
        "eval_loss": ((gap - margin) ** 2 + terms["sft"] + terms["kl"]).mean(),
    }
    assert results[0] == pytest.approx(expected, rel=1e-4)


def test_evaluation_without_margins_leaves_out_what_needs_them(models, tmp_path):
    rows = [{k: row[k] for k in ("id", "prompt", "chosen", "rejected")} for row in pair_rows(5)]
    metrics = make_trainer(models["tied"], tmp_path, rows, eval_rows=rows, loss_type="bt").evaluate()
    assert {"eval_accuracy", "eval_mean_gap", "eval_loss"} <= metrics.keys()
    assert not [name for name in metrics if "margin" in name or "nll" in name or "kl" in name]


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    """Ends the run as a crash would, some steps after its last checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_crashed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(models, tmp_path):
    settings = {
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_rows": pair_rows(3, seed=9),
        "eval_on_start": True,
    }
    data = (pair_rows(22), models["teacher"])

    def run(name: str, resume: bool = False, callbacks: list | None = None) -> dict[str, torch.Tensor]:
        trainer = make_trainer(models["dropout"], tmp_path / name, *data, callbacks=callbacks, **settings)
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path / name) if resume else None)
        return weights_of(trainer)

    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", callbacks=[KillAfter(9)])  # in the second epoch, one step after a checkpoint
    torn = tmp_path / "killed/checkpoint-9"  # a save that was cut off
    torn.mkdir()
    (torn / "config.json").write_text("{")
    assert last_checkpoint(tmp_path / "killed").endswith("checkpoint-8")
    assert_same_weights(whole, run("killed", resume=True), atol=1e-5)


def test_checkpoint_of_an_earlier_run_is_not_complete_while_it_is_written_again(models, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(models["tied"], tmp_path, pair_rows(8), models["teacher"], **settings).train()
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    again = make_trainer(models["tied"], tmp_path, pair_rows(8), models["teacher"], **settings)

    def cut_off(*_, **__):
        raise Killed

    again.save_model = cut_off
    with pytest.raises(Killed):
        again.train()
    assert last_checkpoint(tmp_path) is None


def test_best_model_by_a_held_out_metric_is_the_one_that_is_left(models, tmp_path):
    trainer = make_trainer(
        models["untied"],
        tmp_path,
        pair_rows(12),
        models["teacher"],
        eval_rows=pair_rows(30, seed=4),
        max_steps=6,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss_reward",
        greater_is_better=True,  # the worst is an early one, for sure
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss_reward"] for log in trainer.state.log_history if "eval_loss" in log}
    best = max(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and best < 6
    assert trainer.evaluate()["eval_loss_reward"] == pytest.approx(losses[best], rel=1e-5)
    stock = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    torch.testing.assert_close(stock["score.weight"], trainer.model.score.weight.detach(), rtol=0, atol=0)


def test_trainer_checkpoint_is_a_stock_reward_model_that_keeps_the_language_head(models, tmp_path):
    trainer = make_trainer(
        models["untied"], tmp_path, pair_rows(8), models["teacher"], max_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    checkpoint = Path(last_checkpoint(tmp_path))
    stock = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(
        ["<|im_start|>user\nred<|im_end|>\n", "<|im_start|>user\n<|im_end|>\n"], return_tensors="pt", padding=True
    )
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.model(batch["input_ids"], batch["attention_mask"])["rewards"]
        torch.testing.assert_close(stock(**batch).logits[:, 0], ours, rtol=0, atol=1e-5)
    stored = load_file(checkpoint / "lm_head/model.safetensors")
    assert torch.equal(stored["weight"], trainer.model.language_head.weight)
    assert not (checkpoint / "training_args.bin").exists()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 4)])
def test_loss_that_is_not_finite_stops_the_run_before_its_step_and_names_the_rows(
    models, tmp_path, batch_size, accumulation
):
    rows = pair_rows(4)
    rows[2]["margin"] = 1e30
    trainer = make_trainer(
        models["tied"], tmp_path, rows, loss_type="margin_regression", per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=rf"\['{rows[2]['id']}'\]"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_token_budget_sees_a_step_once_and_only_when_it_is_whole(models, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(TokenBudget, "end", lambda self, tokens: seen.append(tokens))
    more = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_trainer(models["tied"], tmp_path, pair_rows(12), loss_type="bt", **more).train()
    assert len(seen) == 3


def test_held_out_rewards_that_are_not_finite_are_no_metrics(models, tmp_path):
    trainer = make_trainer(models["tied"], tmp_path, pair_rows(4), loss_type="bt", eval_rows=pair_rows(3, seed=5))
    with torch.no_grad():
        trainer.model.score.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="3 of 3 pairs"):
        trainer.evaluate()


def test_kl_term_without_teacher_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="--teacher_model"):
        make_trainer(models["tied"], tmp_path, pair_rows(4))


def test_gradient_checkpointing_changes_no_gradient(models, tmp_path):
    after = []
    for on in (False, True):
        trainer = make_trainer(
            models["tied"], tmp_path, pair_rows(4), models["teacher"], gradient_checkpointing=on, **ONE_SGD_STEP
        )
        trainer.train()
        assert trainer.model.backbone.is_gradient_checkpointing is on
        after.append(weights_of(trainer))
    assert_same_weights(*after, atol=1e-6)


def test_margins_keep_fp32_and_rewards_are_fp32_under_bf16(models, tmp_path):
    trainer = make_trainer(models["tied"], tmp_path, pair_rows(4), models["teacher"], bf16=True, max_steps=1)
    seen = {}
    trainer.model.register_forward_hook(lambda module, inputs, outputs: seen.update(outputs))
    trainer.train()
    assert seen["rewards"].dtype == seen["sft"].dtype == torch.float32
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    batch = trainer._prepare_inputs(trainer.collate(trainer.train_dataset))
    assert batch["margin"].dtype == torch.float32
