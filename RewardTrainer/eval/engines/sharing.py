"""The prompt that a row's responses share, computed once.

The conversations of a row begin with the same tokens and then branch. One sequence holds them all, and a mask keeps
the branches apart:

    tokens     p p p p a a a a b b b
    branch     0 0 0 0 1 1 1 1 2 2 2
    position   0 1 2 3 4 5 6 7 4 5 6

A token sees the tokens before it of the prompt and of its own branch. What comes out at the end of a branch is what
comes out of the conversation alone, because in a causal model no token depends on a later one.

Saved is the prompt of all branches but one; paid is attention over a longer sequence. `plan_row` puts as many branches
together as is cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LONGEST_SHARED = 8192
"""Tokens of the longest sequence with branches: its mask has the square of them."""
Key = tuple[int, int]
"""(row, conversation in it)"""


@dataclass(frozen=True)
class Unit:
    """One sequence to run: a prefix and the branches after it."""

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    """Token ids after the prefix, none empty."""
    keys: tuple[Key, ...]
    """Whose the branches are."""

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(len(branch) for branch in self.branches)


def plan_row(row: int, sequences: Sequence[tuple[int, ...]], width: int, longest: int) -> list[Unit]:
    """The cheapest way to run a row's sequences, so many branches a unit.

    A unit of T tokens costs T linear maps and T^2 attention, T (6 width + T) in one layer of the usual shape (about 12
    width^2 weights).

    Args:
        row: its number, for the keys
        sequences: token ids of its conversations, none of them empty; there may be no conversation
        width: the model's hidden size
        longest: tokens a unit of several branches may have
    """

    def cost(units: list[Unit]) -> int:
        return sum(unit.length * (6 * width + unit.length) for unit in units)

    plans = []
    for size in range(1, len(sequences) + 1):
        numbers = range(0, len(sequences), size)
        units = [unit(row, range(start, min(start + size, len(sequences))), sequences) for start in numbers]
        if size == 1 or max(part.length for part in units) <= longest:
            plans.append(units)
    return min(plans, key=cost, default=[])


def unit(row: int, numbers: Sequence[int], sequences: Sequence[tuple[int, ...]]) -> Unit:
    """Some of a row's sequences as one unit. At least one token of each is its branch."""
    members = [sequences[number] for number in numbers]
    shared = common_prefix(members) if len(members) > 1 else 0
    branches = tuple(ids[shared:] for ids in members)
    return Unit(members[0][:shared], branches, tuple((row, number) for number in numbers))


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens all sequences begin with, at least one less than the shortest has."""
    shortest = min(len(ids) for ids in sequences) - 1
    first = sequences[0]
    for index in range(shortest):
        if any(ids[index] != first[index] for ids in sequences[1:]):
            return index
    return shortest


def pack(
    units: Sequence[Unit], pad_id: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Units as one batch.

    Args:
        units: B of them
        pad_id: the model's pad token; a branch is read at its last token that is not this one, as transformers pools

    Returns:
        input_ids, position_ids, branch (all (B, T); branch is 0 in the prefix, 1, 2, ... in the branches, -1 in the
        padding), and rows and columns (both (branches of all units,)) of the tokens to read
    """
    longest = max(part.length for part in units)
    ids = torch.zeros(len(units), longest, dtype=torch.long)
    positions = torch.zeros(len(units), longest, dtype=torch.long)
    branch_of = torch.full((len(units), longest), -1)
    rows, columns = [], []
    for index, part in enumerate(units):
        end = len(part.prefix)
        ids[index, :end] = torch.tensor(part.prefix, dtype=torch.long)
        positions[index, :end] = torch.arange(end)
        branch_of[index, :end] = 0
        for number, branch in enumerate(part.branches, 1):
            start, end = end, end + len(branch)
            ids[index, start:end] = torch.tensor(branch)
            positions[index, start:end] = torch.arange(len(part.prefix), len(part.prefix) + len(branch))
            branch_of[index, start:end] = number
            rows.append(index)
            columns.append(_last_token(part.prefix, branch, start, pad_id))
    return ids, positions, branch_of, torch.tensor(rows), torch.tensor(columns)


def _last_token(prefix: tuple[int, ...], branch: tuple[int, ...], start: int, pad_id: int | None) -> int:
    """Column of the last token of prefix + branch that is not padding."""
    for offset in reversed(range(len(branch))):
        if branch[offset] != pad_id:
            return start + offset
    return max((column for column, token in enumerate(prefix) if token != pad_id), default=0)


def branch_mask(branch_of: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention logits, (B, 1, T, T): 0 where query may see key, the lowest number elsewhere.

    Args:
        branch_of: (B, T), as `pack` gives it
    """
    length = branch_of.shape[1]
    query, key = branch_of[:, :, None], branch_of[:, None, :]
    before = torch.ones(length, length, dtype=torch.bool, device=branch_of.device).tril()
    seen = before & ((key == 0) | (key == query))  # (B, T, T); padding sees itself, or its softmax would be 0/0
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
