"""Rows of a batch in one line of tokens, without padding, and what they have in common only once.

A pair's rows (chosen, rejected, generative) begin with the same prompt; chosen, a small edit of rejected, often goes
on like it. `prefix_tree` cuts rows into segments so that a common beginning is one segment:

    prompt ---- what chosen and rejected share ---- rest of chosen
          |                                    `--- rest of rejected
          `---- the teacher's answer

A packed batch is all segments of all pairs, one after the other, (1, N). Position ids count from a row's beginning;
every layer but attention looks at single tokens; and in attention a segment's queries see the keys of its ancestors
and their own, in this order, exactly as in a row of their own. So a sliding window is right too: nothing lies between.

Attention over segments (`Segments`) stands in for the model's own function in transformers' attention interface while
a forward carries `segments`, and for nothing else:

    sdpa      one call a segment: causal where it has no ancestor, a mask aligned to the lower right where it has
    flash     one varlen call; with unequal lengths its causal mask is aligned to the lower right already

Why not one row a pair under a tree-shaped mask: it computes the whole square of the row, branches that do not see each
other included. `why_not` says which models must be left to padded rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

# A shared piece of fewer tokens costs more in attention calls than it saves.
MIN_SHARED = 8
SERVED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a row, the same in all rows that go through it; parent: index of the piece before."""

    row: int
    start: int
    stop: int
    parent: int | None


def prefix_tree(rows: Sequence[np.ndarray], share: bool = True) -> tuple[list[Piece], list[int]]:
    """Pieces of the rows, parents first, and for each row the index of its last piece.

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
        grow(list(range(len(rows))), 0, None)
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
    calls: attention calls so far; 0 after a forward means that the model's attention never asked.
    windows: those that were told a sliding window.

    No dataclass: FSDP copies one on its way to every layer, and calls would be counted in the copies.
    """

    def __init__(self, lengths: tuple[int, ...], paths: tuple[tuple[int, ...], ...]):
        self.lengths = lengths
        self.paths = paths
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
                "keys": torch.from_numpy(np.concatenate(keys)).to(device),
                "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32, device=device),
                "cu_seq_lens_k": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
                "max_length_q": max(self.lengths),
                "max_length_k": max(lengths),
            }
        return self._cache["varlen"]


def serve_segments(backbone: PreTrainedModel) -> None:
    """Let the attention implementation that this model uses take `segments`; without them it is what it was."""
    name = backbone.config._attn_implementation
    stock = ALL_ATTENTION_FUNCTIONS[name]
    if not (isinstance(stock, partial) and stock.func is segment_attention):
        flash = is_flash_attention_requested(backbone.config)
        AttentionInterface.register(
            name, partial(segment_attention, stock, flash_by_segment if flash else sdpa_by_segment)
        )


def segment_attention(
    stock: Callable, by_segment: Callable, module, query, key, value, attention_mask, segments=None, **options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers' interface: query, key, value (B, heads, L, d) -> (B, L, heads, d).

    stock: the function it stands in for; by_segment: what is called where there are segments.
    """
    if segments is None:
        return stock(module, query, key, value, attention_mask, **options)
    segments.calls += 1
    segments.windows += options.get("sliding_window") is not None
    return by_segment(stock, module, query, key, value, segments, **options)


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
    # A four-dimensional mask is one that transformers takes as it is: no (N, N) mask is built. Nobody reads it.
    unread = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    hidden = backbone(
        input_ids=input_ids, position_ids=position_ids, attention_mask=unread, use_cache=False, segments=segments
    ).last_hidden_state
    fault = _misread(backbone, segments)
    if fault is not None:
        raise RuntimeError(f"{fault}; train it with --layout padded")
    return hidden


def _misread(backbone: torch.nn.Module, segments: Segments) -> str | None:
    """What was wrong with the attention calls of a forward that has just ended; None where nothing was."""
    config, name = backbone.config, type(backbone).__name__
    if not segments.calls:
        return f"{name} does not hand its segments to attention"
    types = getattr(config, "layer_types", None)
    some = getattr(config, "sliding_window", None) is not None  # without types: of unknown layers
    if segments.windows < (types.count("sliding_attention") if types else some):
        return f"{name} has sliding windows that it writes into the mask alone, which packed rows do not have"
    return None


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
    return ids, position_ids, Segments(tuple(lengths), tuple(paths)), places


def packed_length(rows: Sequence[np.ndarray], share: bool) -> int:
    """Tokens that `pack` makes of one pair."""
    return sum(piece.stop - piece.start for piece in prefix_tree(rows, share)[0])


def why_not(backbone: PreTrainedModel, runnable: bool) -> str | None:
    """Why this model cannot take packed batches; None where it can.

    runnable: whether the model can be called now (weights whole, device right). It is then tried on rows that share
    prefixes, against its own padded forward.
    """
    config, name = backbone.config, type(backbone).__name__
    implementation = config._attn_implementation
    other = sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS)
    if other:
        return f"{name} has layers of type {', '.join(other)}, which would run on across rows"
    if backbone._is_stateful or not backbone._supports_attention_backend:
        return f"{name} does not compute attention through transformers' attention interface alone"
    if implementation != "sdpa" and not is_flash_attention_requested(config):
        return f"--attn_implementation {implementation} cannot; sdpa and flash attention can"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return f"{name} does not attend causally"
    serve_segments(backbone)
    return _trial(backbone) if runnable else None


@torch.no_grad()
def _trial(backbone: PreTrainedModel) -> str | None:
    """Rows with common prefixes, packed, against the model's own padded forward: what is wrong, or None."""
    first = backbone.config.get_text_config().vocab_size // 2
    prompt, answer = first + np.arange(MIN_SHARED + 1), first - 1 - np.arange(MIN_SHARED + 2)
    rows = [np.concatenate([prompt, answer[:cut]]) for cut in (3, 1)] + [np.concatenate([prompt, answer[::-1]])]
    rows.append(np.concatenate([prompt, answer]))
    device, training = backbone.device, backbone.training
    other = f"{type(backbone).__name__} gives other hidden states on packed rows than on padded ones"
    ids, position_ids, segments, places = pack([rows], share=True)
    backbone.eval()
    try:
        packed = run_packed(backbone, ids.to(device), position_ids.to(device), segments)[0]
        for row, place in zip(rows, places[0], strict=True):
            alone = backbone(input_ids=torch.from_numpy(row)[None].to(device), use_cache=False).last_hidden_state[0]
            tolerance = 1e-2 * alone.abs().max().item()
            if not torch.allclose(packed[torch.from_numpy(place).to(device)], alone, rtol=1e-2, atol=tolerance):
                return other
    except (RuntimeError, TypeError):  # it knows no `segments`, or did not use them as it must
        return _misread(backbone, segments) or other
    finally:
        backbone.train(training)
    return None
