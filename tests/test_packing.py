"""Rows without padding and with common beginnings once: the same hidden states and gradients, on every kernel."""

import random

import numpy as np
import pytest
import torch
from packing_fixtures import MODELS, build
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from RewardTrainer import packing
from RewardTrainer.packing import (
    BLOCK,
    MIN_SHARED,
    block_mask,
    flash_by_segment,
    pack,
    prefix_tree,
    run_packed,
    sdpa_by_segment,
    serve_segments,
)
from RewardTrainer.packing_trial import distance, judge
from RewardTrainer.train.batches import PairCollator, split_to


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


def visible(pairs: list[list[np.ndarray]], places: list[list[np.ndarray]], window: int | None) -> np.ndarray:
    """(N, N) bool, the mask by its definition: a token sees those before it in a row of its own, the window's last."""
    count = 1 + max(int(place.max()) for where in places for place in where)
    seen = np.zeros((count, count), dtype=bool)
    for rows, where in zip(pairs, places, strict=True):
        for _, place in zip(rows, where, strict=True):
            for i, own in enumerate(place):
                seen[own, place[max(0, i + 1 - (window or len(place))) : i + 1]] = True
    return seen


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
def test_hidden_states_and_gradients_are_those_of_rows_alone(name, share, kernel):
    model = build(MODELS[name])
    assert judge(model, runnable=True).note.startswith(f"{kernel} attention")
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


@pytest.mark.parametrize("window", [None, 5, 40, 300])
@pytest.mark.parametrize("share", [True, False])
def test_block_mask_is_the_tree_mask_and_leaves_out_no_block_with_a_token_in_it(share, window):
    rng = random.Random(5)
    for count in (1, 4, 12):
        pairs = [pair for _ in range(count) for pair in random_pairs(rng)]
        pairs.append(
            [np.arange(230) % 97, np.concatenate([np.arange(200) % 97, np.arange(90)])]
        )  # several blocks a piece
        _, positions, segments, places = pack(pairs, share)
        seen = visible(pairs, places, window)
        tree = segments.tree(window, torch.device("cpu"))
        length = len(tree.until)
        blocks = block_mask(length, tree)
        assert length % BLOCK == 0 and length >= max(len(seen), 2 * BLOCK)

        tokens = torch.arange(length)
        mask = blocks.mask_mod(None, None, tokens[:, None], tokens).numpy()
        assert (mask[: len(seen), : len(seen)] == seen).all()
        assert not mask[: len(seen), len(seen) :].any() and mask.any(1).all()  # the filling, which sees something

        by_block = mask.reshape(length // BLOCK, BLOCK, length // BLOCK, BLOCK).swapaxes(1, 2)
        for side, axes in (("kv", (0, 1)), ("q", (1, 0))):
            listed = {}
            for name in ("", "full_"):
                numbers, places_of = (
                    getattr(blocks, f"{name}{side}_{part}")[0, 0].tolist() for part in ("num_blocks", "indices")
                )
                listed[name] = {(i, j) for i, n in enumerate(numbers) for j in places_of[i][:n]}
            assert not listed[""] & listed["full_"]
            whole, some = (getattr(by_block, test)((2, 3)).transpose(axes) for test in ("all", "any"))
            assert all(whole[place] for place in listed["full_"])
            assert {tuple(place) for place in np.argwhere(some).tolist()} <= listed[""] | listed["full_"]
            if window is None:  # as torch itself makes them, from all pairs of tokens
                theirs = create_block_mask(blocks.mask_mod, 1, 1, length, length, device="cpu")
                for name in (f"{full}{side}_{part}" for full in ("", "full_") for part in ("num_blocks", "indices")):
                    assert torch.equal(getattr(blocks, name), getattr(theirs, name))
            if window is None:  # exact, and no whole block pays for its mask but on the diagonal
                assert {tuple(place) for place in np.argwhere(some).tolist()} == listed[""] | listed["full_"]
                assert {tuple(place) for place in np.argwhere(whole).tolist()} == listed["full_"]


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("name", ["qwen2", "qwen2 window"])
def test_flex_attention_is_not_traced_anew_for_other_lengths_and_other_numbers_of_segments(name):
    torch._dynamo.reset()
    model = build(MODELS[name])
    packing.serve_segments(model)
    rng, graphs = random.Random(6), []
    for count in (3, 1, 9, 2, 14, 5):
        pairs = [pair for _ in range(count) for pair in random_pairs(rng)]
        before = counters["stats"]["unique_graphs"]
        run_packed(model, *pack(pairs, share=True)[:3]).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs[0] and not any(graphs[1:]), graphs


@pytest.mark.usefixtures("flex_on_cpu")
def test_flex_attention_works_in_the_precision_of_autocast():
    model = build(MODELS["qwen2"])
    packing.serve_segments(model)
    pairs = random_pairs(random.Random(7))
    expected = run_packed(model, *pack(pairs, share=True)[:3])
    with torch.autocast("cpu", torch.bfloat16):
        lower = run_packed(model, *pack(pairs, share=True)[:3])
    lower.sum().backward()
    assert 1e-4 < distance(lower[0], expected[0]) < 3e-2
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_flash_attention_gets_the_keys_and_lengths_that_give_the_same_attention():
    """Its call is checked by its contract: a loop over `cu_seq_lens`, causal, aligned to the lower right."""

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
