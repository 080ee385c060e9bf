"""Packed rows are taken by the models that can and refused to those that cannot, in any precision."""

import re
from types import MethodType

import numpy as np
import pytest
import torch
from packing_fixtures import MODELS, SHAPE, build, build_deep
from transformers import (
    AutoModel,
    FalconConfig,
    GPT2Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from RewardTrainer import packing
from RewardTrainer.packing import pack, run_packed
from RewardTrainer.packing_trial import judge
from RewardTrainer.train.student import choose_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Wider than the rows a model is tried on: what goes wrong there must be seen otherwise.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WIDE = {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1}
QWEN2_MOE = Qwen2MoeConfig(**SHAPE, **EXPERTS, **WIDE, shared_expert_intermediate_size=16)
PHIMOE = PhimoeConfig(**SHAPE | {"bos_token_id": 1, "eos_token_id": 2}, num_local_experts=2, sliding_window=256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_36_random_layers_are_accepted_in_any_precision(dtype, kernel):
    verdict = judge(build_deep(DTYPES[dtype]), runnable=True)
    assert verdict.reason is None, verdict
    assert verdict.note.startswith(f"{kernel} attention; tried: ")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_accepted_in_any_precision(name, dtype, kernel):
    assert judge(build(MODELS[name]).to(DTYPES[dtype]), runnable=True).reason is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_count_the_tokens_they_get_are_accepted(dtype):
    config = Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=16)
    assert judge(build(config).to(DTYPES[dtype]), runnable=True).reason is None


# ---------------------------------------------------------------- planted faults


def leaking_branch(model, monkeypatch):
    """Tokens of a branch also see the branch before it."""
    init, tree = packing.Segments.__init__, packing.Segments.tree

    def leak(self, lengths, paths, positions):
        last = len(paths) - 1
        init(self, lengths, (*paths[:-1], (*paths[last][:-1], last - 1, last)), positions)

    def leak_to_the_end(self, window, device):
        own = tree(self, window, device)
        return own._replace(until=own.until.index_fill(0, torch.tensor([180]), len(own.until)))

    monkeypatch.setattr(packing.Segments, "__init__", leak)
    monkeypatch.setattr(packing.Segments, "tree", leak_to_the_end)


def cut_off_branches(model, monkeypatch):
    """No segment sees its ancestors."""
    init = packing.Segments.__init__
    monkeypatch.setattr(
        packing.Segments,
        "__init__",
        lambda self, lengths, paths, positions: init(self, lengths, tuple((path[-1],) for path in paths), positions),
    )


def positions_that_run_on(model, monkeypatch):
    """The model counts its tokens itself."""
    forward = model.forward

    def counting(self, input_ids, position_ids=None, **rest):
        return forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **rest)

    model.forward = MethodType(counting, model)


def window_ignored(model, monkeypatch):
    """Attention is told of the window and does not mind it."""
    mask, tree = packing.Segments.mask, packing.Segments.tree
    monkeypatch.setattr(packing.Segments, "mask", lambda self, q, k, window, device: mask(self, q, k, None, device))
    monkeypatch.setattr(packing.Segments, "tree", lambda self, window, device: tree(self, None, device))


def tokens_mixed(model, monkeypatch):
    """A layer looks beyond its own token."""
    attention = model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **rest: forward(hidden_states.cumsum(1), **rest)


FAULTS = {
    leaking_branch: "act on the states of other",
    cut_off_branches: "keeps packed rows from",
    positions_that_run_on: "position ids",
    window_ignored: "other hidden states",
    tokens_mixed: "act on the states of other",
}


@pytest.mark.parametrize("model", ["two layers, fp32", "two layers, bf16", "36 layers, bf16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found_in_any_precision(fault, model, kernel, monkeypatch):
    layers, dtype = model.split(", ")
    if fault is window_ignored:
        model = build(MODELS["mistral window"]).to(DTYPES[dtype])
    else:
        model = build_deep(DTYPES[dtype]) if layers == "36 layers" else build(MODELS["qwen2"]).to(DTYPES[dtype])
    assert judge(model, runnable=True).reason is None
    fault(model, monkeypatch)
    verdict = judge(model, runnable=True)
    assert verdict.reason is not None, verdict
    assert re.search(FAULTS[fault], verdict.reason), verdict


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            Qwen3NextConfig(
                **SHAPE, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
                linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
            ),
            "linear_attention",
        ),
        (QWEN2_MOE, "sliding windows that it writes into the mask alone"),
        (PHIMOE, "sliding windows that it writes into the mask alone"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, attn_implementation="eager"), "eager cannot"),
        (
            FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
            "attention interface",
        ),
    ],
    ids=["linear layers", "windows in the mask", "windows without layer types", "eager", "own attention"],
)  # fmt: skip
def test_model_that_cannot_take_segments_is_padded_or_refused_with_the_reason(config, reason, caplog):
    model = AutoModel.from_config(config)
    with caplog.at_level("INFO"):
        assert choose_layout("student", model, None) == "padded"
    assert reason in caplog.text
    with pytest.raises(ValueError, match=f"{reason}.*--layout padded"):
        choose_layout("student", model, "shared_prefix")
    assert choose_layout("student", model, "padded") == "padded"


def test_model_whose_windows_are_in_the_mask_alone_is_served_where_it_has_none():
    config = Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=16)
    assert choose_layout("student", build(config), None) == "shared_prefix"


def test_windows_that_attention_is_not_told_are_an_error_where_the_model_could_not_be_tried():
    model = build(QWEN2_MOE)
    assert judge(model, runnable=False).reason is None  # ZeRO-3 holds its weights in parts
    ids, positions, segments, _ = pack([[np.arange(1, 9)]], share=True)
    with pytest.raises(RuntimeError, match="sliding windows.*--layout padded"):
        run_packed(model, ids, positions, segments)


def test_forward_whose_attention_never_saw_the_segments_is_an_error():
    model = build(MODELS["qwen2"])
    assert judge(model, runnable=True).reason is None
    forward = model.layers[0].self_attn.forward
    for layer in model.layers:
        layer.self_attn.forward = lambda segments=None, **rest: forward(**rest)
    ids, positions, segments, _ = pack([[np.arange(1, 9)]], share=True)
    with pytest.raises(RuntimeError, match="--layout padded"):
        run_packed(model, ids, positions, segments)


def test_flex_attention_that_may_not_be_compiled_is_not_run_uncompiled(flex_on_cpu, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(packing, "compiled_attend", packing.compiled_attend.func.__wrapped__)
    assert "TORCHDYNAMO_DISABLE" in judge(build(MODELS["qwen2"]), runnable=True).reason
