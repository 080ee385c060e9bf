"""Operations as they are counted against those that torch counts, and a step that does not wait for its device."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from train_fixtures import make_trainer, pair_rows, tiny_model, write_cache
from transformers import AutoModel, MistralConfig, Qwen2MoeConfig

from RewardTrainer.train import speed
from RewardTrainer.train.speed import model_cost, pair_cost, peak_flops, seen, whole_run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    teacher = tiny_model(root / "teacher", hidden=48, seed=1, vocab=400)
    return {"student": tiny_model(root / "student", tied=False), "teacher": teacher}


def test_pairs_of_positions_are_those_of_a_causal_mask():
    for start, stop, window in (
        (0, 9, None),
        (5, 30, None),
        (0, 30, 7),
        (3, 5, 7),
        (5, 30, 7),
        (12, 30, 7),
        (0, 4, 9),
    ):
        query, key = np.arange(stop)[:, None], np.arange(stop)
        mask = (key <= query) & (query - key < (window or math.inf)) & (query >= start)
        assert seen(start, stop, window) == mask.sum()


@pytest.mark.parametrize("loss_type", ["distilrm", "bt"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_steps_operations_outside_of_attention_are_those_that_torch_counts(models, tmp_path, loss_type, lora):
    """Of a CPU's attention torch counts nothing; of products that are added in place it would not either."""
    trainer = make_trainer(models["student"], tmp_path, pair_rows(5), models["teacher"], loss_type=loss_type)
    if lora:
        trainer.model.backbone.requires_grad_(False)
        trainer.model.backbone.get_input_embeddings().requires_grad_(True)  # gradients must go through all the same
        if trainer.model.language_head is not None:
            trainer.model.language_head.requires_grad_(False)
    batch = trainer._prepare_inputs(trainer.collate(trainer.train_dataset))

    def in_place(total, left, right, out_shape=None, **options) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5)).backward()

    student = replace(model_cost(trainer.model.backbone, trainer.model.language_head), attention=0.0)
    teacher = trainer.teacher and replace(
        model_cost(trainer.teacher.backbone, trainer.teacher.language_head), attention=0.0
    )
    expected = sum(sum(pair_cost(pair, student, teacher)[1:]) for pair in trainer.train_dataset)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_attention_is_two_products_a_layer_of_its_heads_width(models, tmp_path):
    trainer = make_trainer(models["student"], tmp_path, pair_rows(1), loss_type="bt")
    cost = model_cost(trainer.model.backbone, None)
    assert cost.attention == 2 * (2 * 4 * 8) * 2  # two layers with four heads of eight
    assert cost.flops([(0, 10)], 0, trained=False) == 2 * cost.weights * 10 + cost.attention * 55


def test_what_rows_share_counts_once_and_tokens_count_as_often_as_rows_hold_them(models, tmp_path):
    trainer = make_trainer(models["student"], tmp_path, pair_rows(1), loss_type="bt")
    pair = dict(trainer.train_dataset[0])
    prompt = np.arange(20)
    pair["chosen_input_ids"], pair["rejected_input_ids"] = (
        np.concatenate([prompt, tail]) for tail in ([50, 51], [60])
    )
    cost = model_cost(trainer.model.backbone, None)
    tokens, operations, teacher = pair_cost(pair, cost, None)
    assert (tokens, teacher) == (43, 0.0)
    assert operations == cost.flops([(0, 20), (20, 22), (20, 21)], 0, trained=True)
    assert operations < 0.6 * cost.flops([(0, 22), (0, 21)], 0, trained=True)


def test_experts_count_as_often_as_a_token_goes_through_them_and_windows_by_what_they_see():
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    moe = {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 8,
        "decoder_sparse_step": 1,
    }
    weights = [
        model_cost(AutoModel.from_config(Qwen2MoeConfig(**shape, **moe, num_experts_per_tok=n)), None).weights
        for n in (2, 4)
    ]
    assert weights[1] - weights[0] == 2 * 2 * 3 * 32 * 16  # two more experts, in two layers
    sliding = AutoModel.from_config(MistralConfig(**shape, intermediate_size=48, sliding_window=6))
    cost = model_cost(sliding, None)
    assert cost.attention == 0 and cost.windows == {6: 2 * 4 * 32}


def test_a_gpu_of_which_nothing_is_known_has_no_peak_and_a_known_one_has_its_own(monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("GeForce 256", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda) == peak
        assert peak_flops(cuda, low_precision=False) is None
    assert peak_flops(torch.device("cpu")) is None


def test_the_log_has_the_speed_of_the_steps_between_two_logs_and_no_mfu_where_none_is_known(
    models, tmp_path, monkeypatch
):
    clock = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    more = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for known in (False, True):
        trainer = make_trainer(models["student"], tmp_path, pair_rows(8), models["teacher"], **more)
        trainer.peak_flops = 1e9 if known else None
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        total = [pair_cost(pair, trainer.speed.student, trainer.speed.teacher) for pair in trainer.train_dataset]
        tokens, student, teacher = (sum(part) for part in zip(*total, strict=True))
        seconds = 2 * logs[1]["step_seconds"]  # of two steps, each over all rows
        assert seconds >= 1
        assert logs[1]["step_seconds"] <= logs[1]["slowest_step_seconds"] < seconds
        assert logs[1]["tokens_per_second"] == pytest.approx(2 * tokens / seconds)
        if known:
            assert logs[1]["mfu"] == pytest.approx(2 * student / seconds / 1e9)
            assert logs[1]["mfu_with_teacher"] == pytest.approx(2 * (student + teacher) / seconds / 1e9)
        else:
            assert not any("mfu" in name for log in logs for name in log)
        assert json.dumps(logs)


@pytest.mark.parametrize("every", [10, 2])
def test_a_short_run_has_its_speed_too_and_its_figures_are_those_of_one_log(models, tmp_path, every):
    more = {"max_steps": 5, "logging_steps": every, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(models["student"], tmp_path, pair_rows(20), loss_type="bt", **more)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "step_seconds" in log]
    assert len(logs) == (1 if every == 10 else 3)
    assert all(0 < log["step_seconds"] <= log["slowest_step_seconds"] for log in logs)
    figures = speed.summary(trainer.state.log_history, trainer.args.device)
    assert figures.pop("first_step_seconds") > 0
    assert figures["step_seconds"] == sorted(log["step_seconds"] for log in logs)[len(logs) // 2]
    assert any(figures.items() <= log.items() for log in logs)


def test_the_first_step_is_in_no_log_however_many_batches_it_has(models, tmp_path):
    more = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(models["student"], tmp_path, pair_rows(12), loss_type="bt", **more)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["step_seconds" in log for log in logs] == [False, True, True]
    assert ["first_step_seconds" in log for log in logs] == [True, False, False]
    assert 0 < logs[0]["first_step_seconds"] < 60


def test_loss_of_a_run_that_was_gone_on_from_weighs_each_log_by_its_steps():
    history = [{"step": 4, "loss": 5.0}, {"step": 4, "eval_loss": 9.0}, {"step": 8, "loss": 3.0, "loss_steps": 2}]
    history += [{"step": 12, "loss": 1.0, "loss_steps": 3}, {"step": 16, "loss": 2.0}]
    # Gone on from steps 6 and 9: steps 5, 6 and 9 are in no log.
    whole = whole_run({"train_loss": 1.7, "train_runtime": 2.0}, history, 16, 9)
    mean = (4 * 5 + 2 * 3 + 3 * 1 + 4 * 2) / 13
    assert whole == {"train_loss": mean, "train_runtime": 2.0, "resumed_at_step": 9}


def test_a_log_after_going_on_says_of_how_many_steps_it_is(models, tmp_path):
    rows = pair_rows(20)
    more = {"loss_type": "bt", "max_steps": 7, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    more["save_total_limit"] = 9
    make_trainer(models["student"], tmp_path, rows, **more).train()
    trainer = make_trainer(models["student"], tmp_path, rows, **more)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [(log["step"], log.get("loss_steps")) for log in logs] == [(3, None), (6, 2)]


# ---------------------------------------------------------------- waiting for the device

WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "equal", "unique")


class Waits(TorchDispatchMode):
    """Operations for which, on a GPU, the host would wait: those that read a number, or make one a size."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        if by_mask or name.startswith(WAITS):
            self.seen.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("layout", ["shared_prefix", "padding_free"])
@pytest.mark.parametrize("terms", ["distilrm", "distilrm, cached", "bt", "steerlm"])
def test_an_optimizer_step_reads_from_its_device_only_at_its_end_whether_all_losses_were_finite(
    models, tmp_path, layout, terms
):
    rows, (loss_type, *cached), more = pair_rows(6), terms.split(", "), {}
    if cached:
        more["cached"] = write_cache(tmp_path / "cache", rows, models["student"], models["teacher"], 8)
    trainer = make_trainer(
        models["student"], tmp_path, rows, models["teacher"], loss_type=loss_type, layout=layout,
        max_tokens_per_batch=100, **more,
    )  # fmt: skip
    batches = [{"labels": torch.ones(3), "features": trainer.train_dataset[start : start + 3]} for start in (0, 3)]

    def optimizer_step() -> None:
        inputs, pairs = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
        assert all(len(batch["groups"]) > 1 for batch in inputs)
        for last, batch in enumerate(inputs):
            trainer.accelerator.gradient_state._set_sync_gradients(bool(last))
            trainer.training_step(trainer.model, batch, pairs)

    optimizer_step()  # what is made once and kept
    with Waits() as waits:
        optimizer_step()
    assert waits.seen == ["_local_scalar_dense"], waits.seen
