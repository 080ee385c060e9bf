"""The losses against a plain reference: whole logits, float64, written from the equations."""

import copy

import pytest
import torch
import torch.nn.functional as F

from RewardTrainer.train.losses import LOSSES, check_weights, generative_losses, loss_spec, reward_loss

PAIRS, TOKENS, HIDDEN, VOCAB = 4, 23, 8, 37


# ---------------------------------------------------------------- losses on rewards


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


# ---------------------------------------------------------------- language-model terms


class Setup:
    """A student and a teacher head over random hidden states; pair 1 has no response token."""

    def __init__(self, teacher_vocab=VOCAB, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
        self.head = torch.nn.Linear(HIDDEN, VOCAB, dtype=dtype)
        self.teacher = torch.randn(TOKENS, teacher_vocab, generator=generator).to(dtype) * 2
        self.targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        self.pair_index = torch.tensor([0] * 7 + [2] * 1 + [3] * 15)
        self.weights = torch.rand(2, PAIRS, generator=generator)  # so that every pair's gradient differs

    def reference(self, shared, temperature):
        """sft, kl and the gradients of their weighted sum, from whole float64 logits."""
        hidden = self.hidden.detach().double().requires_grad_()
        head = copy.deepcopy(self.head).double()
        logits, teacher = head(hidden), self.teacher.double()
        sft, kl = [], []
        for pair in range(PAIRS):
            own = [t for t in range(TOKENS) if self.pair_index[t] == pair]
            both = [t for t in own if shared[self.targets[t]]]
            log_p = [torch.log(torch.softmax(logits[t], -1)[self.targets[t]]) for t in own]
            sft.append(-sum(log_p) / len(own) if own else hidden.sum() * 0)
            divergence = []
            for t in both:
                p_s = torch.softmax(logits[t][: len(shared)][shared] / temperature, -1)
                p_t = torch.softmax(teacher[t][: len(shared)][shared] / temperature, -1)
                divergence.append((p_t * (p_t.log() - p_s.log())).sum())
            kl.append(temperature**2 * sum(divergence) / len(both) if both else hidden.sum() * 0)
        sft, kl = torch.stack(sft), torch.stack(kl)
        (self.weights[0] * sft + self.weights[1] * kl).sum().backward()
        return sft, kl, hidden.grad, head.weight.grad, head.bias.grad

    def ours(self, shared_ids, temperature=1.0, chunk_size=5):
        self.hidden.grad = None
        self.head.zero_grad()
        terms = generative_losses(
            self.hidden,
            self.head,
            self.targets,
            self.pair_index,
            PAIRS,
            teacher_logits=lambda rows: self.teacher[rows],
            shared_ids=shared_ids,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        (self.weights[0] * terms.sft + self.weights[1] * terms.kl).sum().backward()
        return terms, (self.hidden.grad, self.head.weight.grad, self.head.bias.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", ["equal", "prefix", "prefix mask", "holes"])
def test_chunked_terms_equal_whole_float64_logits_in_value_and_gradient(vocabularies, temperature):
    setup = Setup(teacher_vocab=VOCAB if vocabularies == "equal" else VOCAB + 6)
    shared = torch.ones(VOCAB, dtype=torch.bool)
    if vocabularies.startswith("prefix"):
        shared[30:] = False  # the student's padding ids; targets from 30 up are not counted
    if vocabularies == "holes":
        shared[[3, 11, 36]] = False
    given = {"equal": None, "prefix": 30, "prefix mask": shared, "holes": shared}[vocabularies]
    terms, gradients = setup.ours(given, temperature)
    sft, kl, *expected = setup.reference(shared, temperature)
    torch.testing.assert_close(terms.sft.double(), sft, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.kl.double(), kl, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert terms.tokens.tolist() == [7, 0, 1, 15]
    counted = shared[setup.targets]
    assert terms.kl_tokens.tolist() == [int(counted[setup.pair_index == pair].sum()) for pair in range(PAIRS)]
    assert vocabularies == "equal" or terms.kl_tokens.sum() < terms.tokens.sum()


@pytest.mark.parametrize("chunk_size", [1, 7, TOKENS, 1000])
def test_chunk_size_changes_neither_value_nor_gradient(chunk_size):
    setup = Setup()
    whole, whole_gradients = setup.ours(None, chunk_size=TOKENS)
    whole_gradients = [gradient.clone() for gradient in whole_gradients]
    terms, gradients = setup.ours(None, chunk_size=chunk_size)
    torch.testing.assert_close(terms.sft, whole.sft)
    torch.testing.assert_close(terms.kl, whole.kl)
    for ours, theirs in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_no_logits_of_more_than_a_chunk_exist_and_none_wait_for_the_backward_pass():
    setup, chunk, seen, saved = Setup(), 4, [], []
    linear = setup.head

    def head(hidden):
        seen.append(hidden.shape[0])
        return linear(hidden)

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = generative_losses(
            setup.hidden,
            head,
            setup.targets,
            setup.pair_index,
            PAIRS,
            lambda rows: setup.teacher[rows],
            chunk_size=chunk,
        )
    assert max(seen) == chunk and sum(seen) == TOKENS
    assert not [shape for shape in saved if shape[-1:] == (VOCAB,)]
    terms.kl.sum().backward()
    assert sum(seen) == 2 * TOKENS  # computed again, chunk by chunk


def test_pair_without_response_tokens_is_zero_and_has_no_nan():
    terms, gradients = Setup().ours(None)
    assert terms.sft[1] == terms.kl[1] == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_batch_without_any_response_token_is_zero_and_still_reaches_the_head():
    setup = Setup()
    empty = torch.empty(0, dtype=torch.long)
    terms = generative_losses(
        setup.hidden[:0], setup.head, empty, empty, PAIRS, lambda rows: setup.teacher[rows][:0], chunk_size=4
    )
    assert terms.sft.tolist() == terms.kl.tolist() == [0.0] * PAIRS
    (terms.sft + terms.kl).sum().backward()
    assert setup.head.weight.grad is not None and not setup.head.weight.grad.any()


def test_pair_whose_every_target_is_unshared_has_no_kl_but_keeps_its_sft():
    setup = Setup()
    setup.targets[setup.pair_index == 2] = VOCAB - 1
    terms, gradients = setup.ours(VOCAB - 1)
    assert terms.kl[2] == 0 and terms.kl_tokens[2] == 0
    assert terms.sft[2] > 0 and terms.tokens[2] == 1
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("extra", [0, 9])
def test_teacher_that_agrees_on_shared_ids_has_zero_kl_whatever_it_says_elsewhere(extra):
    setup = Setup()
    with torch.no_grad():
        own = setup.head(setup.hidden)
    setup.teacher = torch.cat([own, torch.full((TOKENS, extra), 50.0)], dim=1)  # teacher-only ids hold all its mass
    terms, _ = setup.ours(VOCAB)
    assert terms.kl.abs().max() < 1e-6


def test_removed_ids_get_no_kl_gradient():
    setup = Setup()
    shared = torch.ones(VOCAB, dtype=torch.bool)
    shared[[4, 20]] = False
    setup.weights[0] = 0  # KL alone
    _, (_, weight, _) = setup.ours(shared)
    assert not weight[[4, 20]].any() and weight[5].any()


def test_without_teacher_there_is_no_kl():
    setup = Setup()
    terms = generative_losses(setup.hidden, setup.head, setup.targets, setup.pair_index, PAIRS)
    assert terms.kl.tolist() == [0.0] * PAIRS and terms.kl_tokens.tolist() == [0] * PAIRS
    torch.testing.assert_close(terms.sft, setup.ours(None)[0].sft)


def test_bf16_models_are_reduced_in_fp32():
    setup = Setup(dtype=torch.bfloat16)
    terms, gradients = setup.ours(None)
    assert terms.sft.dtype == terms.kl.dtype == torch.float32
    logits = setup.head(setup.hidden).double()  # the bf16 logits themselves, then exact arithmetic
    nll = F.cross_entropy(logits, setup.targets, reduction="none")[setup.pair_index == 3].mean()
    p_t, p_s = setup.teacher.double().softmax(-1), logits.softmax(-1)
    kl = (p_t * (p_t / p_s).log()).sum(-1)[setup.pair_index == 3].mean()
    torch.testing.assert_close(terms.sft[3].double(), nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.kl[3].double(), kl, rtol=1e-5, atol=0)
    assert gradients[0].dtype == torch.bfloat16 and gradients[0].any()


def test_different_vocabularies_without_shared_ids_are_refused():
    with pytest.raises(ValueError, match="give shared_ids"):
        Setup(teacher_vocab=VOCAB + 1).ours(None)
    with pytest.raises(ValueError, match="38 shared ids"):
        Setup(teacher_vocab=VOCAB + 1).ours(VOCAB + 1)


def test_token_axes_that_do_not_match_are_refused():
    setup = Setup()
    setup.targets = setup.targets[1:]
    with pytest.raises(ValueError, match="must be"):
        setup.ours(None)


def test_forward_kl_equals_trl():
    module = pytest.importorskip("trl.kernels.chunked_divergence")
    setup, temperature = Setup(), 2.0
    teacher = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    setup.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        setup.teacher = teacher(setup.hidden)
        theirs, _ = module.ChunkedDivergenceFunction.apply(
            setup.hidden, setup.head.weight, None, setup.hidden, teacher.weight, None, 0.0, temperature
        )
    terms = generative_losses(
        setup.hidden, setup.head, setup.targets, torch.arange(TOKENS), TOKENS, lambda rows: setup.teacher[rows],
        temperature=temperature,
    )  # fmt: skip
    torch.testing.assert_close(terms.kl.detach(), temperature**2 * theirs, rtol=1e-5, atol=1e-6)
