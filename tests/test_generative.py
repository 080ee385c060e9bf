"""The language-model terms against a plain reference: whole logits, float64, written from the equations."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from RewardTrainer.train import generative
from RewardTrainer.train.generative import generative_losses
from RewardTrainer.train.student import LanguageHead

PAIRS, TOKENS, HIDDEN, VOCAB = 4, 23, 8, 37


class Setup:
    """A student and a teacher head over random hidden states; pair 1 has no response token."""

    def __init__(self, teacher_vocab=VOCAB, dtype=torch.float32, seed=0, frozen=False, **config):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype) * 0.3)
        self.bias = torch.nn.Parameter(torch.randn(VOCAB, generator=generator).to(dtype) * 0.3)
        self.head = LanguageHead(self.weight, self.bias, SimpleNamespace(**config)).requires_grad_(not frozen)
        self.teacher = torch.randn(TOKENS, teacher_vocab, generator=generator).to(dtype) * 2
        self.targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        self.pair_index = torch.tensor([0] * 7 + [2] * 1 + [3] * 15)
        self.weights = torch.rand(2, PAIRS, generator=generator)  # so that every pair's gradient differs

    def gradients(self) -> list[torch.Tensor]:
        return [tensor.grad for tensor in (self.hidden, self.weight, self.bias)]

    def reference(self, shared, temperature=1.0):
        """sft, kl and the gradients of their weighted sum, from whole float64 logits."""
        hidden = self.hidden.detach().double().requires_grad_()
        head = copy.deepcopy(self.head).double()
        logits, teacher = head.logits(hidden), self.teacher.double()
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
        loss = (self.weights[0] * sft + self.weights[1] * kl).sum()
        loss.backward()
        return loss, sft, kl, [hidden.grad, head.weight.grad, head.bias.grad]

    def terms(self, shared_ids=None, temperature=1.0, chunk_size=5):
        return generative_losses(
            self.hidden,
            self.head,
            self.targets,
            self.pair_index,
            PAIRS,
            teacher=lambda rows: self.teacher[rows],
            sft_weight=self.weights[0],
            kl_weight=self.weights[1],
            shared_ids=shared_ids,
            temperature=temperature,
            chunk_size=chunk_size,
        )

    def ours(self, *arguments, scale=1.0, **options):
        """The terms, and the gradients of `scale` times their loss."""
        terms = self.terms(*arguments, **options)
        (scale * terms.loss).backward()
        gradients = self.gradients()
        self.hidden.grad = self.weight.grad = self.bias.grad = None
        return terms, gradients


@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 1.5}, {"logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", ["equal", "prefix", "prefix mask", "holes"])
def test_chunked_terms_equal_whole_float64_logits_in_value_and_gradient(vocabularies, temperature, config):
    setup = Setup(teacher_vocab=VOCAB if vocabularies == "equal" else VOCAB + 6, **config)
    shared = torch.ones(VOCAB, dtype=torch.bool)
    if vocabularies.startswith("prefix"):
        shared[30:] = False  # the student's padding ids; targets from 30 up are not counted
    if vocabularies == "holes":
        shared[[3, 11, 36]] = False
    given = {"equal": None, "prefix": 30, "prefix mask": shared, "holes": shared}[vocabularies]
    terms, gradients = setup.ours(given, temperature, scale=3.0)  # as a loss scaler multiplies it
    loss, sft, kl, expected = setup.reference(shared, temperature)
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.sft.double(), sft, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.kl.double(), kl, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), 3 * theirs, rtol=1e-4, atol=1e-6)
    assert terms.tokens.tolist() == [7, 0, 1, 15]
    counted = shared[setup.targets]
    assert terms.kl_tokens.tolist() == [int(counted[setup.pair_index == pair].sum()) for pair in range(PAIRS)]
    assert vocabularies == "equal" or terms.kl_tokens.sum() < terms.tokens.sum()


@pytest.mark.parametrize("chunk_size", [1, 7, TOKENS, 1000])
def test_chunk_size_changes_neither_value_nor_gradient(chunk_size, monkeypatch):
    setup = Setup()
    whole, whole_gradients = setup.ours(chunk_size=TOKENS)
    monkeypatch.setitem(generative.BLOCK_ELEMENTS, "cpu", 3 * VOCAB)  # nor does the block within a chunk
    terms, gradients = setup.ours(chunk_size=chunk_size)
    torch.testing.assert_close(terms.loss, whole.loss)
    torch.testing.assert_close(terms.sft, whole.sft)
    torch.testing.assert_close(terms.kl, whole.kl)
    for ours, theirs in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_no_logits_of_more_than_a_chunk_exist_and_each_is_computed_once(monkeypatch):
    setup, chunk, seen, asked, saved = Setup(), 4, [], [], []
    logits = LanguageHead.logits
    monkeypatch.setattr(
        LanguageHead, "logits", lambda self, hidden, *rest: seen.append(len(hidden)) or logits(self, hidden, *rest)
    )
    teacher, setup.teacher = setup.teacher, None

    class Teacher:
        def __getitem__(self, rows):
            asked.append(rows.stop - rows.start)
            return teacher[rows]

    setup.teacher = Teacher()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        terms = setup.terms(chunk_size=chunk)
    assert max(seen) == max(asked) == chunk and sum(seen) == sum(asked) == TOKENS
    assert not [shape for shape in saved if len(shape) == 2 and shape[-1] == VOCAB]
    terms.loss.backward()
    assert sum(seen) == sum(asked) == TOKENS  # nothing again in the backward pass


def test_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one():
    trained, frozen = Setup(), Setup(frozen=True)
    _, (expected, *_) = trained.ours()
    _, (hidden, weight, bias) = frozen.ours()
    torch.testing.assert_close(hidden, expected)
    assert weight is None and bias is None


def test_values_without_gradient_are_those_with():
    setup = Setup()
    terms, _ = setup.ours()
    with torch.no_grad():
        alone = setup.terms()
    assert not alone.loss.requires_grad
    for ours, theirs in zip(alone, terms, strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_terms_of_single_pairs_carry_no_gradient_that_could_be_wrong():
    terms = Setup().terms()
    assert terms.loss.requires_grad and not terms.sft.requires_grad and not terms.kl.requires_grad


def test_pair_without_response_tokens_is_zero_and_has_no_nan():
    terms, gradients = Setup().ours()
    assert terms.sft[1] == terms.kl[1] == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_batch_without_any_response_token_is_zero_and_still_reaches_the_head():
    setup = Setup()
    empty = torch.empty(0, dtype=torch.long)
    terms = generative_losses(setup.hidden[:0], setup.head, empty, empty, PAIRS, lambda rows: setup.teacher[rows])
    assert terms.sft.tolist() == terms.kl.tolist() == [0.0] * PAIRS
    terms.loss.backward()
    assert setup.weight.grad is not None and not setup.weight.grad.any()


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
        own = setup.head.logits(setup.hidden)
    setup.teacher = torch.cat([own, torch.full((TOKENS, extra), 50.0)], dim=1)  # teacher-only ids hold all its mass
    assert setup.terms(VOCAB).kl.abs().max() < 1e-6


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
    torch.testing.assert_close(terms.sft, setup.terms().sft)
    torch.testing.assert_close(terms.loss.detach(), terms.sft.sum())


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bf16_models_are_reduced_in_fp32(autocast):
    setup = Setup(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms, gradients = setup.ours()
        logits = setup.head.logits(setup.hidden).double()  # the bf16 logits themselves, then exact arithmetic
    assert terms.sft.dtype == terms.kl.dtype == terms.loss.dtype == torch.float32
    nll = F.cross_entropy(logits, setup.targets, reduction="none")[setup.pair_index == 3].mean()
    p_t, p_s = setup.teacher.double().softmax(-1), logits.softmax(-1)
    kl = (p_t * (p_t / p_s).log()).sum(-1)[setup.pair_index == 3].mean()
    torch.testing.assert_close(terms.sft[3].double(), nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.kl[3].double(), kl, rtol=1e-5, atol=0)
    assert gradients[0].dtype == setup.hidden.dtype and gradients[1].dtype == setup.weight.dtype
    _, exact = setup.reference(torch.ones(VOCAB, dtype=torch.bool))[2:]
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_fp16_gradients_of_a_small_share_of_the_step_do_not_vanish():
    setup = Setup(dtype=torch.float16)
    setup.weights *= 1e-6  # under fp16's least number with every probability they multiply
    _, gradients = setup.ours(scale=2.0**20)  # as a loss scaler does
    setup.weights *= 2.0**20
    *_, exact = setup.reference(torch.ones(VOCAB, dtype=torch.bool))
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_different_vocabularies_without_shared_ids_are_refused():
    with pytest.raises(ValueError, match="give shared_ids"):
        Setup(teacher_vocab=VOCAB + 1).terms()
    with pytest.raises(ValueError, match="38 shared ids"):
        Setup(teacher_vocab=VOCAB + 1).terms(VOCAB + 1)


def test_token_axes_that_do_not_match_are_refused():
    setup = Setup()
    setup.targets = setup.targets[1:]
    with pytest.raises(ValueError, match="must be"):
        setup.terms()


def test_forward_kl_equals_trl():
    module = pytest.importorskip("trl.kernels.chunked_divergence")
    torch.manual_seed(0)
    setup, temperature = Setup(), 2.0
    teacher = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        setup.bias.zero_()
        setup.teacher = teacher(setup.hidden)
        theirs, _ = module.ChunkedDivergenceFunction.apply(
            setup.hidden, setup.weight, None, setup.hidden, teacher.weight, None, 0.0, temperature
        )
    terms = generative_losses(
        setup.hidden, setup.head, setup.targets, torch.arange(TOKENS), TOKENS, lambda rows: setup.teacher[rows],
        temperature=temperature,
    )  # fmt: skip
    torch.testing.assert_close(terms.kl, temperature**2 * theirs, rtol=1e-5, atol=1e-6)
