"""The token budget that a GPU's memory allows: reckoned from what forwards took, in the first steps alone."""

import pytest
import torch

from RewardTrainer.train.token_budget import FIRST, MOST, SHARE, STEPS, TokenBudget, fitting

GIB = 2**30


class Gpu:
    """A GPU whose memory is numbers: `kept` by the run, and `per_token` bytes for the time of a forward."""

    def __init__(self, monkeypatch, total: int, kept: int, per_token: int):
        self.total, self.kept, self.per_token, self.peak = total, kept, per_token, 0
        for name, value in {
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.kept),
            "memory_allocated": lambda device: self.kept,
            "memory_reserved": lambda device: self.peak,
            "max_memory_allocated": lambda device: self.peak,
            "mem_get_info": lambda device: (self.total - self.peak, self.total),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def step(self, budget: TokenBudget, tokens: int, keeps: int = 0) -> int | None:
        budget.begin()
        tokens = min(tokens, budget.tokens)
        self.kept += keeps
        self.peak = max(self.peak, self.kept + tokens * self.per_token)
        return budget.end(tokens)


@pytest.mark.parametrize(("total", "most"), [(141 * GIB, MOST), (80 * GIB, None), (24 * GIB, FIRST)])
def test_forwards_grow_to_what_is_free_beside_model_and_optimizer_and_never_beyond(monkeypatch, total, most):
    gpu = Gpu(monkeypatch, total, kept=10 * GIB, per_token=2 * 2**20)
    budget = TokenBudget(None, torch.device("cuda"))
    assert budget.tokens == FIRST
    assert gpu.step(budget, 10**6, keeps=12 * GIB) is None  # the optimizer's state comes with the first step
    new = gpu.step(budget, 10**6) or FIRST
    assert new == budget.tokens == pytest.approx(most or SHARE * (total - 22 * GIB) / (2 * 2**20), abs=1)
    if most is None:
        assert 22 * GIB + budget.tokens * gpu.per_token < total
    for _ in range(STEPS):
        gpu.step(budget, 10**6)
    settled = budget.tokens
    gpu.per_token *= 4
    assert gpu.step(budget, 10**6) is None and budget.tokens == settled


def test_small_batches_are_not_taken_for_what_a_token_costs_once_larger_ones_were_seen(monkeypatch):
    gpu = Gpu(monkeypatch, 80 * GIB, kept=0, per_token=2**20)
    budget = TokenBudget(None, torch.device("cuda"))
    gpu.step(budget, 4000)
    gpu.step(budget, 4000)
    settled = budget.tokens
    assert gpu.step(budget, 100) is None and budget.tokens == settled


@pytest.mark.parametrize(("fixed", "device"), [(500, "cuda"), (None, "cpu"), (500, "cpu")])
def test_a_budget_that_was_given_stays_and_a_cpu_has_none(fixed, device):
    budget = TokenBudget(fixed, torch.device(device))
    for _ in range(STEPS):
        budget.begin()
        assert budget.end(5000) is None
    assert budget.tokens == fixed


def test_fitting_tokens_are_a_share_of_what_is_free():
    assert fitting(free=100 * 2000, taken=50_000, tokens=1000) == 3200
