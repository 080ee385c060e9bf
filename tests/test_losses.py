"""The losses on rewards against a plain reference: float64, written from the equations."""

import pytest
import torch

from RewardTrainer.train.losses import LOSSES, check_weights, loss_spec, reward_loss

PAIRS = 4


@pytest.fixture
def rewards():
    torch.manual_seed(0)
    fields = ("chosen_rewards", "rejected_rewards", "margin", "chosen_score", "rejected_score")
    return {name: torch.randn(PAIRS, dtype=torch.float64) * 2 for name in fields}


def reference_reward_loss(loss_type, chosen_rewards, rejected_rewards, margin, chosen_score, rejected_score, scale):
    values = []
    for r_w, r_l, m, s_w, s_l in zip(
        chosen_rewards, rejected_rewards, margin, chosen_score, rejected_score, strict=True
    ):
        gap, m = r_w - r_l, m / scale
        log_s = lambda x: -torch.log1p(torch.exp(-x))  # noqa: E731
        soft = 1 / (1 + torch.exp(-m))
        values.append(
            {
                "bt": -log_s(gap),
                "grm": -log_s(gap),
                "margin": -log_s(gap - m),
                "steerlm": (r_w - s_w) ** 2 + (r_l - s_l) ** 2,
                "lsam": -soft * log_s(gap) - (1 - soft) * log_s(-gap),
                "margin_regression": (gap - m) ** 2,
                "distilrm": (gap - m) ** 2,
            }[loss_type]
        )
    return torch.stack(values)


@pytest.mark.parametrize(
    ("loss_type", "scale"), [(name, scale) for name in LOSSES for scale in (1.0, 3.0)[: 1 + LOSSES[name].uses_margin]]
)
def test_reward_loss_equals_its_equation_in_value_and_gradient(loss_type, scale, rewards):
    ours = {k: v.float().requires_grad_(k.endswith("rewards")) for k, v in rewards.items()}
    plain = {k: v.clone().requires_grad_(k.endswith("rewards")) for k, v in rewards.items()}
    loss = reward_loss(loss_type, **ours, margin_scale=scale)
    expected = reference_reward_loss(loss_type, **plain, scale=scale)
    assert loss.shape == (PAIRS,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    for name in ("chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(ours[name].grad.double(), plain[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["chosen_rewards", "rejected_rewards", "margin", "chosen_score", "rejected_score"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_column_shaped_tensor_is_refused_instead_of_broadcast(loss_type, name, rewards):
    rewards[name] = rewards[name].unsqueeze(1)  # (pairs, 1)
    with pytest.raises(ValueError, match=r"\(4, 1\)|expected \("):
        reward_loss(loss_type, **rewards)


def test_tensor_of_another_number_of_pairs_is_refused(rewards):
    rewards["margin"] = rewards["margin"][:1]  # (1,) would broadcast too
    with pytest.raises(ValueError, match="margin has shape"):
        reward_loss("margin_regression", **rewards)


def test_bf16_rewards_are_subtracted_in_fp32():
    chosen = torch.tensor([128.0], dtype=torch.bfloat16)
    rejected = torch.tensor([0.3125], dtype=torch.bfloat16)  # bf16 would round the gap to 127.5
    assert reward_loss("margin_regression", chosen, rejected, torch.tensor([127.0])).item() == 0.6875**2


@pytest.mark.parametrize("loss_type", [name for name, spec in LOSSES.items() if spec.needs])
def test_missing_field_is_refused_by_name(loss_type, rewards):
    field = LOSSES[loss_type].needs[-1]
    del rewards[field]
    with pytest.raises(ValueError, match=f"needs `{field}`"):
        reward_loss(loss_type, **rewards)


def test_a_loss_that_is_only_listed_does_not_train_as_another(monkeypatch, rewards):
    monkeypatch.setitem(LOSSES, "new", LOSSES["margin_regression"])
    with pytest.raises(NotImplementedError, match="new"):
        reward_loss("new", **rewards)


def test_unknown_loss_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="bt, margin, steerlm"):
        loss_spec("dpo")


# ---------------------------------------------------------------- weights


def test_default_weights_are_those_of_the_loss():
    defaults = {name: check_weights(name) for name in LOSSES}
    assert defaults.pop("grm") == (1.0, 0.0)
    assert defaults.pop("distilrm") == (1.0, 1.0)
    assert set(defaults.values()) == {(0.0, 0.0)}
    assert check_weights("distilrm", 0.5, 0.0) == (0.5, 0.0)
    assert check_weights("bt", 0.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bt", 0.5, None), "--sft_weight 0.5 would be ignored.*remove the flag or use --loss_type grm or distilrm"),
        (("grm", None, 1.0), "--kl_weight 1 would be ignored.*use --loss_type distilrm"),
        (("bt", None, None, 2.0), "--margin_scale 2 would be ignored.*margin or lsam"),
        (("distilrm", -1.0, None), "--sft_weight -1: must be"),
        (("distilrm", None, float("nan")), "--kl_weight nan: must be"),
        (("distilrm", None, None, 0.0), "--margin_scale 0: must be"),
    ],
)
def test_weight_the_loss_would_ignore_is_refused_with_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_weights(*arguments)
