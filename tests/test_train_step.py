"""The whole training step against the loss as one would write it down, in value and in every gradient."""

from pathlib import Path

import peft
import pytest
import torch
from train_fixtures import make_trainer, pair_rows, tiny_model
from transformers import AutoModelForCausalLM

from RewardTrainer.train.trainer import DistilTrainer

WEIGHTS = {
    "reward_weight": 2.0,
    "sft_weight": 0.5,
    "kl_weight": 0.7,
    "kl_temperature": 2.0,
    "margin_scale": 1.5,
    "chunk_size": 5,
}
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "gemma2": {"sliding_window": 9, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    built = {
        f"{family}-{name}": tiny_model(root / f"{family}-{name}", tied=name == "tied", family=family, **config)
        for family, config in FAMILIES.items()
        for name in ("tied", "untied")
    }
    return built | {"teacher": tiny_model(root / "teacher", hidden=48, seed=1, vocab=400)}


def plain_joint_loss(lm, score: torch.Tensor, teacher, trainer: DistilTrainer) -> torch.Tensor:
    """The loss as DESIGN.md writes it: a forward a sequence, no padding, whole logits, one pair after another."""
    losses = []
    for pair in trainer.train_dataset:
        reward = {}
        for side in ("chosen", "rejected"):
            ids = torch.as_tensor(pair[f"{side}_input_ids"]).long()
            reward[side] = lm.model(input_ids=ids[None]).last_hidden_state[0, -1] @ score
        loss = 2.0 * (reward["chosen"] - reward["rejected"] - pair["margin"] / 1.5) ** 2

        ids, start = torch.as_tensor(pair["gen_input_ids"]).long(), pair["gen_response_start"]
        logits = lm(input_ids=ids[None]).logits[0, start - 1 : -1]
        loss = loss - 0.5 * logits.log_softmax(-1)[torch.arange(len(ids) - start), ids[start:]].mean()

        ids, start = torch.as_tensor(pair["teacher_input_ids"]).long(), pair["teacher_response_start"]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids[None]).logits[0, start - 1 : -1]
        # The first ids of both, or those of a mask.
        shared = trainer.shared_ids
        shared = torch.arange(shared) if isinstance(shared, int) else shared.nonzero()[:, 0]
        p = (teacher_logits[:, shared] / 2).softmax(-1)
        q = (logits[:, shared] / 2).softmax(-1)
        losses.append(loss + 0.7 * 4 * (p * (p / q).log()).sum(-1).mean())
    return torch.stack(losses).mean()


def one_batch(trainer: DistilTrainer) -> torch.Tensor:
    """Forward and backward over the whole training set as one batch; the loss."""
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.collate(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(len(trainer.train_dataset)))
    loss.backward()
    return loss


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            ours[name].double() / scale, gradient / scale, rtol=0, atol=atol, msg=lambda t, name=name: f"{name}: {t}"
        )


def check(trainer: DistilTrainer, student: Path, teacher: Path, step=one_batch) -> None:
    """The step's loss and gradients against the plain reference in float64."""
    lm = AutoModelForCausalLM.from_pretrained(student).double()
    score = trainer.model.score.weight[0].detach().double().requires_grad_()
    reference = plain_joint_loss(lm, score, AutoModelForCausalLM.from_pretrained(teacher).double(), trainer)
    reference.backward()
    torch.testing.assert_close(step(trainer).double(), reference, rtol=1e-5, atol=1e-5)
    expected = {f"backbone.{n.removeprefix('model.')}": p.grad for n, p in lm.named_parameters()}
    expected["score.weight"] = score.grad[None]
    if not trainer.model.tied:
        expected["language_head.weight"] = expected.pop("backbone.lm_head.weight")
    assert_same_gradients({n: p.grad for n, p in trainer.model.named_parameters()}, expected, atol=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_without_padding_and_with_shared_prefixes_is_the_plain_one(models, tmp_path, family, tied, checkpointing):
    student = models[f"{family}-{tied}"]
    trainer = make_trainer(student, tmp_path, pair_rows(6), models["teacher"], **WEIGHTS)
    assert trainer.collate.layout == "shared_prefix" and trainer.collate.teacher_layout == "shared_prefix"
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(trainer, student, models["teacher"])


@pytest.mark.parametrize("layout", ["shared_prefix", "padding_free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_terms_of_every_pair_are_those_of_padded_rows(models, tmp_path, family, layout):
    terms = {}
    for name in (layout, "padded"):
        trainer = make_trainer(models[f"{family}-tied"], tmp_path, pair_rows(6), models["teacher"], layout=name)
        assert trainer.collate.layout == trainer.collate.teacher_layout == name
        with torch.no_grad():
            batch = trainer._prepare_inputs(trainer.collate(trainer.train_dataset))
            terms[name] = trainer.pair_terms(trainer.model, batch)
    assert terms[layout].keys() == terms["padded"].keys() >= {"chosen", "rejected", "sft", "kl", "generative"}
    assert len(terms[layout]["chosen"].unique()) == 6
    for name, values in terms["padded"].items():
        torch.testing.assert_close(
            terms[layout][name], values, rtol=0, atol=1e-4, msg=lambda t, name=name: f"{name}: {t}"
        )


@pytest.mark.parametrize("layout", ["padding_free", "padded"])
def test_step_in_the_other_layouts_is_the_plain_one(models, tmp_path, layout):
    trainer = make_trainer(models["qwen2-untied"], tmp_path, pair_rows(6), models["teacher"], layout=layout, **WEIGHTS)
    assert trainer.collate.layout == layout
    check(trainer, models["qwen2-untied"], models["teacher"])


def test_shared_prefixes_are_fewer_tokens(models, tmp_path):
    counts = {}
    for layout in ("shared_prefix", "padding_free", "padded"):
        trainer = make_trainer(models["qwen2-tied"], tmp_path, pair_rows(6), models["teacher"], layout=layout)
        batch = trainer.collate(trainer.train_dataset)
        counts[layout] = batch["input_ids"].numel()
    rows = [len(pair[f"{name}_input_ids"]) for pair in trainer.train_dataset for name in ("chosen", "rejected", "gen")]
    assert counts["padding_free"] == sum(rows) and counts["padded"] == len(rows) * max(rows)
    assert counts["shared_prefix"] < 0.8 * counts["padding_free"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_step_with_adapters_on_a_frozen_model_is_the_plain_one(models, tmp_path, checkpointing):
    """LoRA: no gradient but the adapters' and the reward head's; the LM head is frozen."""
    path = models["qwen2-untied"]
    trainer = make_trainer(path, tmp_path, pair_rows(6), models["teacher"], **WEIGHTS)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    trainer.model.language_head.requires_grad_(False)
    trainer.model.backbone = peft.get_peft_model(trainer.model.backbone, lora)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    lm = AutoModelForCausalLM.from_pretrained(path)
    peft.inject_adapter_in_model(lora, lm.model)
    adapters = {n.removeprefix("base_model.model."): p for n, p in trainer.model.backbone.named_parameters()}
    lm.model.load_state_dict({n: p.detach() for n, p in adapters.items()})
    score = trainer.model.score.weight[0].detach().double().requires_grad_()
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher"]).double()
    reference = plain_joint_loss(lm.double(), score, teacher, trainer)
    reference.backward()

    torch.testing.assert_close(one_batch(trainer).double(), reference, rtol=1e-5, atol=1e-5)
    trained = {n for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert all("lora_" in name or name == "score.weight" for name in trained) and len(trained) > 6
    expected = {n: p.grad for n, p in lm.model.named_parameters() if "lora_" in n}
    assert_same_gradients({n: adapters[n].grad for n in expected}, expected, atol=2e-5)
    torch.testing.assert_close(trainer.model.score.weight.grad[0].double(), score.grad, rtol=1e-4, atol=1e-4)
