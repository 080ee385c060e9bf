"""Rows of a batch in one line of tokens, without padding, and what they have in common only once.

A pair's rows (chosen, rejected, generative) begin with the same prompt; chosen, a small edit of rejected, often goes
on like it. `prefix_tree` cuts rows into segments so that a common beginning is one segment:

    prompt ---- what chosen and rejected share ---- rest of chosen
          |                                    `--- rest of rejected
          `---- the teacher's answer

A packed batch is all segments of all pairs, one after the other, (1, N), each followed by its descendants. Position
ids count from a row's beginning; every layer but attention looks at single tokens; and in attention a segment's
queries see the keys of its ancestors and their own, in this order, exactly as in a row of their own.

Attention over segments (`Segments`) stands in for the model's own function in transformers' attention interface while
a forward carries `segments`, and for nothing else:

    flex      on a GPU: FlexAttention, one kernel a layer however many segments there are, compiled once for all
              lengths. A segment's descendants stand right behind it, so that one number a key says who sees it:
              k <= q < until[k]. A sliding window is a condition on positions beside it.
    segments  on a CPU: one call of the model's own function a segment, causal where it has no ancestor, a mask aligned
              to the lower right where it has. FlexAttention has no backward pass there.
    flash     one varlen call; with unequal lengths its causal mask is aligned to the lower right already

Which of them is right for a model is seen on trial (`packing_trial.py`), never assumed.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

# A shared piece of fewer tokens costs more in attention calls than it saves.
MIN_SHARED = 8
# Side of the squares that FlexAttention takes or leaves as a whole.
BLOCK = 128
FLEX_DEVICES = {"cuda"}


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a row, the same in all rows that go through it; parent: index of the piece before."""

    row: int
    start: int
    stop: int
    parent: int | None


def prefix_tree(rows: Sequence[np.ndarray], share: bool = True) -> tuple[list[Piece], list[int]]:
    """Pieces of the rows, each followed by those that go on from it, and for each row the index of its last piece.

    A row is the tokens of its last piece's ancestors and its own. Without `share` every row is one piece.
    """
    pieces: list[Piece] = []
    last = [0] * len(rows)

    def add(members: list[int], start: int, stop: int, parent: int | None) -> int:
        pieces.append(Piece(members[0], start, stop, parent))
        return len(pieces) - 1

    def grow(members: list[int], start: int, parent: int | None) -> None:
        """Cut `members`, equal up to `start`, from there on; never are all of them at their end."""
        if len(members) == 1:
            last[members[0]] = add(members, start, len(rows[members[0]]), parent)
            return
        stop = common_prefix([rows[i] for i in members], start)
        if stop - start >= MIN_SHARED:
            start, parent = stop, add(members, start, stop, parent)
        branches: dict[int, list[int]] = {}
        for i in members:
            if start == len(rows[i]):
                last[i] = parent
            else:  # rows that end here are alone: a key of their own, no token id
                branches.setdefault(int(rows[i][stop]) if stop < len(rows[i]) else -1 - i, []).append(i)
        for branch in branches.values():
            grow(branch, start, parent)

    if share:
        same: dict[bytes, int] = {}  # equal rows are one, however short
        first = [same.setdefault(row.tobytes(), i) for i, row in enumerate(rows)]
        grow(list(same.values()), 0, None)
        last = [last[i] for i in first]
    else:
        last = [add([i], 0, len(row), None) for i, row in enumerate(rows)]
    return pieces, last


def common_prefix(rows: Sequence[np.ndarray], start: int = 0) -> int:
    """Number of first tokens that all rows share, at least `start`."""
    stop = min(len(row) for row in rows)
    for row in rows[1:]:
        different = np.flatnonzero(rows[0][start:stop] != row[start:stop])
        if len(different):
            stop = start + int(different[0])
    return stop


class Segments:
    """How the tokens of a packed batch (1, N) attend.

    lengths: of the segments, in their order; their sum is N.
    paths: for each segment the indices of the segments whose keys it sees: its ancestors from the root, then itself.
    positions: (N,) int, each token's place in its row.
    calls: attention calls so far; 0 after a forward means that the model's attention never asked.
    windows: those that were told a sliding window.

    No dataclass: FSDP copies one on its way to every layer, and calls would be counted in the copies.
    """

    def __init__(self, lengths: tuple[int, ...], paths: tuple[tuple[int, ...], ...], positions: np.ndarray):
        self.lengths = lengths
        self.paths = paths
        self.positions = positions
        self.calls = self.windows = 0
        self._cache: dict = {}  # masks and index tensors: the same in every layer

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """(1, 1, queries, keys) bool, causal and aligned to the lower right; None where plain causal attention is."""
        window = window if window is not None and window < keys else None
        if window is None and queries == keys:
            return None
        key = (queries, keys, window)
        if key not in self._cache:
            back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            self._cache[key] = ((back >= 0) if window is None else (back >= 0) & (back < window))[None, None]
        return self._cache[key]

    def varlen(self, device: torch.device) -> dict[str, torch.Tensor | int]:
        """What flash attention's varlen call takes, and `keys` (sum of key lengths,): which token each key is."""
        if "varlen" not in self._cache:
            ends = [0, *accumulate(self.lengths)]
            keys = [np.concatenate([np.arange(ends[i], ends[i + 1]) for i in path]) for path in self.paths]
            lengths = [len(own) for own in keys]
            self._cache["varlen"] = {
                "keys": to_device(torch.from_numpy(np.concatenate(keys)), device),
                "cu_seq_lens_q": to_device(torch.tensor(ends, dtype=torch.int32), device),
                "cu_seq_lens_k": to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device),
                "max_length_q": max(self.lengths),
                "max_length_k": max(lengths),
            }
        return self._cache["varlen"]

    def until(self) -> np.ndarray:
        """(N,) int32: key k is seen by the queries k <= q < until[k], which are its segment's and its descendants'."""
        ends = list(accumulate(self.lengths))
        last = ends.copy()  # of each segment's descendants, which stand behind it
        for own in reversed(range(len(ends))):
            for ancestor in self.paths[own][:-1]:
                last[ancestor] = max(last[ancestor], ends[own])
        return np.repeat(np.array(last, dtype=np.int32), self.lengths)

    def tree(self, window: int | None, device: torch.device) -> "Tree":
        """What FlexAttention's mask is made of: of the tokens, and of the filling behind them, which sees itself."""
        key = ("tree", window)
        if key not in self._cache:
            length = filled(len(self.positions))
            fill = length - len(self.positions)
            until = np.pad(self.until(), (0, fill), constant_values=length)
            positions = np.pad(self.positions.astype(np.int32), (0, fill))
            partial_and_full = block_tables(until, positions, window)
            # By queries, and by keys for the backward pass.
            tables = [table for dense in partial_and_full for side in (dense, dense.T) for table in _listed(side)]
            seen_back = None if window is None else np.array(window, dtype=np.int32)
            self._cache[key] = Tree(
                *(None if part is None else _of_any_length(part, device) for part in (until, positions, seen_back)),
                *(_of_any_length(table, device) for table in tables),
            )
        return self._cache[key]


class Tree(NamedTuple):
    """Tensors that say who sees whom in a packed batch filled up to N tokens, n blocks; all int32.

    until, positions (N,): see `Segments`. window (): the sliding one; None: none. The others are FlexAttention's
    tables of the blocks where some queries see some keys, and (`full_`) of those where all see all: how many a block
    of queries (1, 1, n), and which (1, 1, n, n), and the same for blocks of keys.
    """

    until: torch.Tensor
    positions: torch.Tensor
    window: torch.Tensor | None
    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor


def filled(length: int) -> int:
    """How many tokens FlexAttention gets for so many: whole blocks, two at least. Others would be further kernels."""
    return BLOCK * max(2, -(-length // BLOCK))


def block_mask(length: int, tree: Tree) -> BlockMask:
    """FlexAttention's mask of N = length tokens: query q sees key k where k <= q < until[k], inside the window."""
    until, positions, window, *_ = tree

    def seen(batch, head, q, k):
        return (k <= q) & (q < until[k])

    def seen_through_a_window(batch, head, q, k):
        return (k <= q) & (q < until[k]) & (positions[q] - positions[k] < window)

    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=tree.kv_num_blocks,
        kv_indices=tree.kv_indices,
        full_kv_num_blocks=tree.full_kv_num_blocks,
        full_kv_indices=tree.full_kv_indices,
        q_num_blocks=tree.q_num_blocks,
        q_indices=tree.q_indices,
        full_q_num_blocks=tree.full_q_num_blocks,
        full_q_indices=tree.full_q_indices,
        BLOCK_SIZE=(BLOCK, BLOCK),  # no default before torch 2.13
        mask_mod=seen if window is None else seen_through_a_window,
    )


def block_tables(until: np.ndarray, positions: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(blocks of queries, blocks of keys) bool, twice: where some queries see some keys, and where all see all.

    until, positions: (N,), N whole blocks. What `create_block_mask` finds by way of all N x N pairs. With a window a
    block in which nothing is seen may be taken for one where something is, which costs time and changes nothing.
    """
    blocks = np.arange(len(until) // BLOCK)
    until, positions = (values.reshape(-1, BLOCK) for values in (until, positions))
    first, last = blocks * BLOCK, (blocks + 1) * BLOCK - 1  # queries of a block
    behind = blocks[:, None] > blocks
    some = behind & (until.max(1) > first[:, None])
    full = behind & (until.min(1) > last[:, None])
    if window is not None:
        some &= positions.min(1)[:, None] - positions.max(1) < window
        full &= positions.max(1)[:, None] - positions.min(1) < window
    np.fill_diagonal(some, True)
    return some & ~full, full


def _listed(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table as FlexAttention takes it: for each row the number of true places, (1, 1, rows) int32, and the places,
    true ones first, (1, 1, rows, columns) int32."""
    order = np.argsort(~dense, axis=1, kind="stable").astype(np.int32)
    return dense.sum(1, dtype=np.int32)[None, None], order[None, None]


def _of_any_length(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """There, and marked as of any size: what a mask holds is otherwise taken for fixed until it is seen to change."""
    tensor = to_device(torch.from_numpy(values), device)
    for dim, size in enumerate(values.shape):
        if size > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy there that the host does not wait for: from pageable memory it would wait for all that is under way."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def no_plans_by_shape() -> None:
    """Keep SDPA from cuDNN, which makes a plan for every new pair of lengths: seconds a step, as rows come."""
    torch.backends.cuda.enable_cudnn_sdp(False)


# ---------------------------------------------------------------- attention


def kernel_of(config, device: torch.device) -> str | None:
    """flex, segments or flash (see the module docstring); None where the model's implementation is none of ours."""
    if is_flash_attention_requested(config):
        return "flash"
    name = config._attn_implementation
    if device.type in FLEX_DEVICES:
        return "flex" if name in ("sdpa", "flex_attention") else None
    return "segments" if name == "sdpa" else None


def serve_segments(backbone: PreTrainedModel) -> None:
    """Let the attention implementation that this model uses take `segments`; without them it is what it was."""
    name = backbone.config._attn_implementation
    stock = ALL_ATTENTION_FUNCTIONS[name]
    if not (isinstance(stock, partial) and stock.func is segment_attention):
        AttentionInterface.register(name, partial(segment_attention, stock))


def segment_attention(
    stock: Callable, module, query, key, value, attention_mask, segments=None, **options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers' interface: query, key, value (B, heads, L, d) -> (B, L, heads, d).

    stock: the function it stands in for.
    """
    if segments is None:
        return stock(module, query, key, value, attention_mask, **options)
    segments.calls += 1
    segments.windows += options.get("sliding_window") is not None
    by_segment = {"flex": flex_by_segment, "segments": sdpa_by_segment, "flash": flash_by_segment}
    return by_segment[kernel_of(module.config, query.device)](stock, module, query, key, value, segments, **options)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree) -> torch.Tensor:
    """FlexAttention over a tree: (1, heads, N, d) each -> (1, heads, N, d). To be compiled.

    The mask is made in here, where its length is that of the queries: taken from outside it would be a number, and
    every other number another kernel.
    """
    mask = block_mask(query.shape[2], tree)
    group = query.shape[1] // key.shape[1]
    if group > 1 and torch.is_grad_enabled():
        # For the backward pass: its kernel goes through a group's queries one after the other, a third slower.
        key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
    return flex_attention(query, key, value, block_mask=mask, enable_gqa=group > 1)


@cache
def compiled_attend(backend: str = "inductor") -> Callable:
    """`attend` for the lengths that `flex_by_segment` marks as any.

    `fullgraph`: past dynamo's limit of variants it would go on uncompiled, with all N x N scores in memory. Their
    number is that of models, precisions, windows and modes of a process, and may well be over the usual 8.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise RuntimeError("FlexAttention must be compiled, and TORCHDYNAMO_DISABLE=1 says not to")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(attend, fullgraph=True, backend=backend)


def flex_by_segment(
    stock: Callable, module, query, key, value, segments, scaling=None, sliding_window=None, dropout=0.0, **options
):
    """All segments in one call of FlexAttention; the queries are whole blocks (`run_packed` fills them up)."""
    if dropout:
        raise RuntimeError("FlexAttention has no attention dropout")
    # As transformers' own functions do: sdpa ignores a soft cap, flex_attention has it; sinks are in neither of ours.
    softcap = options.get("softcap") if module.config._attn_implementation == "flex_attention" else None
    if softcap is not None or options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise RuntimeError("soft caps, attention sinks and position biases are not served on packed rows")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in fp32
        query, key, value = (part.to(torch.get_autocast_dtype(query.device.type)) for part in (query, key, value))
    width = query.shape[3]
    if scaling is not None and not math.isclose(scaling, width**-0.5):  # a number of its own would be an input, not
        query = query * (scaling * width**0.5)  # part of the kernel
    for part in (query, key, value):
        # The length is any, all else fixed: heads of student and teacher are not to be taken for something varying.
        torch._dynamo.mark_dynamic(part, 2)
        for dim in (0, 1, 3):
            torch._dynamo.mark_static(part, dim)
    output = compiled_attend()(query, key, value, segments.tree(sliding_window, query.device))
    return output.transpose(1, 2), None


def sdpa_by_segment(stock: Callable, module, query, key, value, segments, sliding_window=None, **options):
    """Each segment by itself; see the module docstring."""
    # `split`, because the gradient of many slices would be many tensors of the whole length.
    queries, keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for own, path in enumerate(segments.paths):
        k, v = (parts[own] if len(path) == 1 else torch.cat([parts[i] for i in path], 2) for parts in (keys, values))
        mask = segments.mask(queries[own].shape[2], k.shape[2], sliding_window, query.device)
        outputs.append(stock(module, queries[own], k, v, mask, sliding_window=sliding_window, **options)[0])
    return torch.cat(outputs, dim=1), None


def flash_by_segment(stock: Callable, module, query, key, value, segments, **options):
    """All segments in one varlen call; keys that several segments see are repeated."""
    varlen = dict(segments.varlen(query.device))
    index = varlen.pop("keys")
    options.pop("position_ids", None)
    return stock(module, query, key.index_select(2, index), value.index_select(2, index), None, **options, **varlen)


def run_packed(
    backbone: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """input_ids, position_ids (1, N) -> last hidden states (1, N, H)."""
    length = input_ids.shape[1]
    if kernel_of(backbone.config, input_ids.device) == "flex":
        input_ids, position_ids = (F.pad(ids, (0, filled(length) - length)) for ids in (input_ids, position_ids))
    # A four-dimensional mask is one that transformers takes as it is: no (N, N) mask is built. Nobody reads it.
    unread = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    hidden = backbone(
        input_ids=input_ids, position_ids=position_ids, attention_mask=unread, use_cache=False, segments=segments
    ).last_hidden_state
    fault = misread(backbone, segments)
    if fault is not None:
        raise RuntimeError(f"{fault}; take --layout padded")
    return hidden[:, :length]


def misread(backbone: torch.nn.Module, segments: Segments) -> str | None:
    """What was wrong with the attention calls of a forward that has just ended; None where nothing was."""
    config, name = backbone.config, type(backbone).__name__
    if not segments.calls:
        return f"{name} does not hand its segments to attention"
    types = getattr(config, "layer_types", None)
    some = getattr(config, "sliding_window", None) is not None  # without types: of unknown layers
    if segments.windows < (types.count("sliding_attention") if types else some):
        return f"{name} has sliding windows that it writes into the mask alone, which packed rows do not have"
    return None


# ---------------------------------------------------------------- rows to tensors


def pack(
    pairs: Sequence[Sequence[np.ndarray]], share: bool
) -> tuple[torch.Tensor, torch.Tensor, Segments, list[list[np.ndarray]]]:
    """The rows of each pair -> input_ids, position_ids (1, N) long, segments, and for each row where its tokens are.

    The last is (len(row),) positions in [0, N) for every row of every pair.
    """
    tokens, positions, lengths, paths, places = [], [], [], [], []
    end = 0
    for rows in pairs:
        pieces, last = prefix_tree(rows, share)
        first = len(lengths)  # of this pair's segments
        where = []
        for i, piece in enumerate(pieces):
            tokens.append(rows[piece.row][piece.start : piece.stop])
            positions.append(np.arange(piece.start, piece.stop))
            lengths.append(piece.stop - piece.start)
            own = np.arange(end, end + lengths[-1])
            end += lengths[-1]
            if piece.parent is None:
                paths.append((first + i,))
                where.append(own)
            else:
                paths.append((*paths[first + piece.parent], first + i))
                where.append(np.concatenate([where[piece.parent], own]))
        places.append([where[i] for i in last])
    ids, position_ids = (torch.from_numpy(np.concatenate(parts)).long()[None] for parts in (tokens, positions))
    return ids, position_ids, Segments(tuple(lengths), tuple(paths), np.concatenate(positions)), places


def packed_length(rows: Sequence[np.ndarray], share: bool) -> int:
    """Tokens that `pack` makes of one pair."""
    return sum(piece.stop - piece.start for piece in prefix_tree(rows, share)[0])
