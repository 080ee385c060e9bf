"""Rows without padding and with common beginnings once: the same hidden states, and refusals where not."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from RewardTrainer.train.batches import PairCollator, split_to
from RewardTrainer.train.packing import MIN_SHARED, pack, prefix_tree, run_packed, serve_segments, why_not
from RewardTrainer.train.student import choose_layout

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "llama": LlamaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=512),
    # Windows that the prompts below outgrow: a branch must not see further back than in a row of its own.
    "gemma2 window": Gemma2Config(**SHAPE, head_dim=8, sliding_window=7),
    "qwen2 window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "mistral window": MistralConfig(**SHAPE, sliding_window=6),
    "cohere2 window": Cohere2Config(**SHAPE, sliding_window=6),
}


# Wider than the rows a model is tried on: what goes wrong there must be seen otherwise.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
WIDE = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
QWEN2_MOE = Qwen2MoeConfig(**SHAPE, **EXPERTS, **WIDE, shared_expert_intermediate_size=16)
PHIMOE = PhimoeConfig(**SHAPE | {"bos_token_id": 1, "eos_token_id": 2}, num_local_experts=2, sliding_window=64)


def build(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_pairs(rng: random.Random, vocabulary: int = 97) -> list[list[np.ndarray]]:
    """Pairs of three rows with common prefixes of all kinds: none, short, long, whole rows, one row in another."""
    pairs = []
    for _ in range(rng.randint(1, 4)):
        rows = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 40))]]
        for _ in range(2):
            old = rng.choice(rows)
            kept = rng.randint(0, len(old))
            rows.append(old[:kept] + [rng.randrange(vocabulary) for _ in range(rng.randint(kept == 0, 20))])
        rng.shuffle(rows)
        pairs.append([np.array(row, dtype=np.int32) for row in rows])
    return pairs


@pytest.mark.parametrize("share", [True, False])
def test_every_row_can_be_read_from_the_pack_and_from_the_keys_its_last_token_sees(share):
    rng = random.Random(0)
    for _ in range(300):
        pairs = random_pairs(rng, vocabulary=rng.choice((2, 97)))
        ids, positions, segments, places = pack(pairs, share)
        assert sum(segments.lengths) == ids.shape[1] == positions.shape[1]
        keys, ends = segments.varlen(torch.device("cpu"))["keys"], np.cumsum([0, *segments.lengths])
        starts = segments.varlen(torch.device("cpu"))["cu_seq_lens_k"].tolist()
        for rows, where in zip(pairs, places, strict=True):
            for row, place in zip(rows, where, strict=True):
                assert ids[0, place].tolist() == row.tolist()
                assert positions[0, place].tolist() == list(range(len(row)))
                own = int(np.searchsorted(ends, place[-1], side="right")) - 1
                assert keys[starts[own] : starts[own + 1]].tolist()[: len(place)] == place.tolist()
        if not share:
            assert ids.shape[1] == sum(len(row) for rows in pairs for row in rows)


def test_common_beginnings_are_there_once_and_none_of_a_useful_length_twice():
    prompt, edit = list(range(20)), list(range(30, 45))
    rows = [np.array(row) for row in (prompt + edit + [50], prompt + edit + [51, 52], prompt + [60] * 9)]
    pieces, last = prefix_tree(rows)
    assert sorted(piece.stop - piece.start for piece in pieces) == [1, 2, 9, len(edit), len(prompt)]
    assert len(set(last)) == 3
    rng = random.Random(1)
    for _ in range(300):
        for rows in random_pairs(rng, vocabulary=2):
            pieces, _ = prefix_tree(rows)
            for i, one in enumerate(pieces):
                for two in pieces[i + 1 :]:
                    if one.parent == two.parent and one.start == two.start:
                        a, b = (rows[p.row][p.start : p.stop] for p in (one, two))
                        length = min(len(a), len(b))
                        same = length if (a[:length] == b[:length]).all() else int(np.argmax(a[:length] != b[:length]))
                        assert same < MIN_SHARED


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_rows_alone(name, share):
    model = build(MODELS[name])
    assert why_not(model, runnable=True) is None
    rng = random.Random(2)
    prompt = [rng.randrange(97) for _ in range(25)]
    pairs = [
        [np.array(prompt + [rng.randrange(97) for _ in range(length)]) for length in lengths]
        for lengths in ((9, 1, 14), (3, 12, 5))
    ] + random_pairs(rng)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1))

    ids, positions, segments, places = pack(pairs, share)
    packed = run_packed(model, ids, positions, segments)[0]
    flat = [
        (row, place) for rows, where in zip(pairs, places, strict=True) for row, place in zip(rows, where, strict=True)
    ]
    loss = sum(torch.tanh(packed[place] @ weight).sum() for _, place in flat)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    alone = [
        model(input_ids=torch.from_numpy(row)[None].long(), use_cache=False).last_hidden_state[0] for row, _ in flat
    ]
    for (_, place), hidden in zip(flat, alone, strict=True):
        torch.testing.assert_close(packed[place], hidden, rtol=1e-4, atol=1e-4)
    sum(torch.tanh(hidden @ weight).sum() for hidden in alone).backward()
    for n, parameter in model.named_parameters():
        scale = max(1.0, parameter.grad.abs().max().item())
        torch.testing.assert_close(
            ours[n] / scale, parameter.grad / scale, rtol=0, atol=1e-4, msg=lambda t, n=n: f"{n}: {t}"
        )


def test_flash_attention_gets_the_keys_and_lengths_that_give_the_same_attention():
    """Its call is checked by its contract: a loop over `cu_seq_lens`, causal, aligned to the lower right."""
    from RewardTrainer.train.packing import flash_by_segment, sdpa_by_segment

    def varlen(module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scaling):
        outputs = []
        for i in range(len(cu_seq_lens_q) - 1):
            q = query[:, :, cu_seq_lens_q[i] : cu_seq_lens_q[i + 1]]
            k, v = (tensor[:, :, cu_seq_lens_k[i] : cu_seq_lens_k[i + 1]] for tensor in (key, value))
            assert q.shape[2] <= max_length_q and k.shape[2] <= max_length_k
            late = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]) == 0
            scores = (q @ k.transpose(2, 3) * scaling).masked_fill(late, -torch.inf)
            outputs.append((scores.softmax(-1) @ v).transpose(1, 2))
        return torch.cat(outputs, 1), None

    def sdpa(module, query, key, value, mask, scaling, sliding_window):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling
        )
        return out.transpose(1, 2), None

    _, positions, segments, _ = pack(random_pairs(random.Random(3)), share=True)
    query, key, value = torch.randn(3, 1, 2, positions.shape[1], 8)
    one, _ = flash_by_segment(varlen, None, query, key, value, segments, scaling=0.3)
    two, _ = sdpa_by_segment(sdpa, None, query, key, value, segments, scaling=0.3)
    torch.testing.assert_close(one, two)


def test_attention_without_segments_is_untouched():
    model = build(MODELS["qwen2"])
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
    before = model(input_ids=ids, attention_mask=mask).last_hidden_state
    serve_segments(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, before)
    assert model.config._attn_implementation == "sdpa"


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


def test_model_whose_packed_rows_come_out_otherwise_is_refused():
    model = build(MODELS["qwen2"])
    assert why_not(model, runnable=True) is None
    attention = model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **rest: forward(
        hidden_states.cumsum(1), **rest
    )  # looks beyond its own token
    assert "other hidden states" in why_not(model, runnable=True)


def test_model_whose_windows_are_in_the_mask_alone_is_served_where_it_has_none():
    config = Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=16)
    assert choose_layout("student", build(config), None) == "shared_prefix"


def test_windows_that_attention_is_not_told_are_an_error_where_the_model_could_not_be_tried():
    model = build(QWEN2_MOE)
    assert why_not(model, runnable=False) is None  # ZeRO-3 holds its weights in parts
    ids, positions, segments, _ = pack([[np.arange(1, 9)]], share=True)
    with pytest.raises(RuntimeError, match="sliding windows.*--layout padded"):
        run_packed(model, ids, positions, segments)


def test_forward_whose_attention_never_saw_the_segments_is_an_error():
    model = build(MODELS["qwen2"])
    assert why_not(model, runnable=True) is None
    forward = model.layers[0].self_attn.forward
    for layer in model.layers:
        layer.self_attn.forward = lambda segments=None, **rest: forward(**rest)
    ids, positions, segments, _ = pack([[np.arange(1, 9)]], share=True)
    with pytest.raises(RuntimeError, match="--layout padded"):
        run_packed(model, ids, positions, segments)


# ---------------------------------------------------------------- micro-batches by token budget


def features_of(lengths: list[int]) -> list[dict]:
    return [
        {"chosen_input_ids": np.arange(n), "rejected_input_ids": np.arange(n) + 1, "gen_input_ids": None, "id": i}
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("layout", ["shared_prefix", "padding_free", "padded"])
def test_groups_hold_every_pair_once_and_keep_to_the_budget(layout):
    rng = random.Random(4)
    for _ in range(100):
        features = features_of([rng.randint(1, 60) for _ in range(rng.randint(1, 20))])
        budget = rng.randint(1, 400)
        groups = PairCollator(0, layout=layout).micro_batches(features, budget)
        assert sorted(feature["id"] for group in groups for feature in group) == list(range(len(features)))
        for group in groups:
            lengths = [len(feature["chosen_input_ids"]) for feature in group]
            tokens = 2 * len(group) * max(lengths) if layout == "padded" else 2 * sum(lengths)
            assert tokens <= budget or len(group) == 1
        count = rng.randint(len(groups), len(features))
        split = split_to(groups, count)
        assert len(split) == count and all(split)
        assert sorted(feature["id"] for group in split for feature in group) == list(range(len(features)))
    with pytest.raises(ValueError, match="unequal"):
        split_to(groups, len(features) + 1)
