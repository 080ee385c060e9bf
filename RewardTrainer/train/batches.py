"""From features to what the models take: rows of a batch, where to read them, and micro-batches by token budget.

Three layouts of rows. `padded`: one row of the tensor each, padded on the right to the longest of this batch.
`padding_free`: all in one line. `shared_prefix`: all in one line, what the rows of a pair begin with once
(`packing.py`). Whichever it is, the batch says *where* to read as positions in the flattened hidden states (rows * L,
H), so that nothing behind it knows the layout:

    reward_index (2B,)   the last token of each chosen row, then of each rejected row
    gen_index (T,)       the position *before* each response token of the generative rows: it predicts that token
    gen_targets (T,)     the response tokens;  gen_pairs (T,) the pair in this batch that each belongs to
    teacher_index (T,)   the same as gen_index in the teacher's rows

The response tokens are those that `data.py` marks; teacher and student have them in the same order, whatever stands
before them. A response never starts at 0: each token has a position before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from RewardTrainer.packing import pack, packed_length
from RewardTrainer.train.cached_teacher import CachedTeacher
from RewardTrainer.train.rows import NUMBERS

Layout = Literal["shared_prefix", "padding_free", "padded"]


@dataclass
class PairCollator:
    """Features of B pairs -> tensors.

    input_ids (rows, L) long: chosen, rejected and, where there are, generative rows; without padding (1, N)
    attention_mask (rows, L) long; without padding instead: position_ids (1, N) long, and `segments`
    reward_index, gen_index, gen_targets, gen_pairs: see the module docstring; `gen_*` where the loss has text
    teacher_input_ids, teacher_attention_mask or teacher_position_ids and teacher_segments, teacher_index
    teacher_top_ids, teacher_top_logprobs, teacher_tail: in their place with `cached_teacher`, see its `rows`
    margin, chosen_score, rejected_score (B,) float32: each where every pair of the batch has it
    pair_index (B,) long: position in the dataset
    labels (B,) long, all 1: what transformers.Trainer counts to learn how many pairs the optimizer step has

    Where the generative text is the chosen response (`grm`), its rows stand beside the chosen ones: the templates of
    the two may differ at their end.
    """

    pad_token_id: int
    teacher_pad_token_id: int | None = None
    layout: Layout = "padded"
    teacher_layout: Layout = "padded"
    cached_teacher: CachedTeacher | None = None

    def __call__(self, features: Sequence[Mapping]) -> dict:
        pairs = [rows_of(feature) for feature in features]
        batch, places = _arrange(pairs, self.layout, self.pad_token_id)
        batch["reward_index"] = torch.tensor([rows[side][-1] for side in (0, 1) for rows in places])
        if len(pairs[0]) == 3:
            starts = [feature["gen_response_start"] for feature in features]
            batch["gen_index"] = _before_responses([rows[2] for rows in places], starts)
            responses = [rows[2][start:] for rows, start in zip(pairs, starts, strict=True)]
            batch["gen_targets"] = torch.from_numpy(np.concatenate(responses)).long()
            batch["gen_pairs"] = torch.repeat_interleave(torch.tensor([len(response) for response in responses]))
        if self.cached_teacher is not None:
            cached = self.cached_teacher.rows([feature["id"] for feature in features])
            batch |= {f"teacher_{name}": value for name, value in cached.items()}
        elif features[0]["teacher_input_ids"] is not None:
            pad = self.pad_token_id if self.teacher_pad_token_id is None else self.teacher_pad_token_id
            rows = [[feature["teacher_input_ids"]] for feature in features]
            teacher, places = _arrange(rows, self.teacher_layout, pad)
            batch |= {f"teacher_{name}": value for name, value in teacher.items()}
            starts = [feature["teacher_response_start"] for feature in features]
            batch["teacher_index"] = _before_responses([rows[0] for rows in places], starts)
        for name in NUMBERS:
            values = [feature[name] for feature in features]
            if None not in values:
                batch[name] = torch.tensor(values, dtype=torch.float32)
        batch["pair_index"] = torch.tensor([feature["pair_index"] for feature in features])
        batch["labels"] = torch.ones(len(features), dtype=torch.long)
        return batch

    def micro_batches(self, features: Sequence[Mapping], budget: int) -> list[list]:
        """Cut pairs into groups whose student rows are at most `budget` tokens, padding included.

        A pair over the budget is a group of its own. Longest first, each into the first group with room: groups then
        hold pairs of similar length, which padding likes, and are about as few as can be.
        """
        share, padded = self.layout == "shared_prefix", self.layout == "padded"
        groups: list[list] = []
        sizes: list[list[int]] = []
        own = [_tokens(rows_of(feature), share, padded) for feature in features]
        for i in sorted(range(len(features)), key=lambda i: -own[i]):
            # A padded group is as wide as its longest row, which came first.
            totals = [size[0] * (len(size) + 1) if padded else sum(size) + own[i] for size in sizes]
            room = next((group for group, total in enumerate(totals) if total <= budget), None)
            if room is None:
                room = len(groups)
                groups.append([])
                sizes.append([])
            groups[room].append(features[i])
            sizes[room].append(own[i])
        return groups


def _tokens(rows: list[np.ndarray], share: bool, padded: bool) -> int:
    """Positions that the backbone computes for one pair."""
    return len(rows) * max(map(len, rows)) if padded else packed_length(rows, share)


def rows_of(feature: Mapping) -> list[np.ndarray]:
    """The student's rows of a pair: chosen, rejected, and the generative one where there is."""
    names = ("chosen_input_ids", "rejected_input_ids", "gen_input_ids")
    return [np.asarray(feature[name]) for name in names if feature[name] is not None]


def list_features(features: Sequence[Mapping]) -> dict:
    """The data loader's collate function: the pairs as they are, for the trainer to cut into micro-batches."""
    return {"labels": torch.ones(len(features), dtype=torch.long), "features": list(features)}


def split_to(groups: list[list], count: int) -> list[list]:
    """The same pairs in `count` groups, no fewer than given, by halving the one with the most pairs.

    Ranks that share weights (ZeRO-3, FSDP) must go through the model equally often; they have equally many pairs.
    """
    groups = [list(group) for group in groups]
    while len(groups) < count:
        most = max(groups, key=len)
        if len(most) == 1:
            raise ValueError(
                f"{len(groups)} pairs cannot be cut into {count} micro-batches: ranks have unequal batches"
            )
        groups.append(most[len(most) // 2 :])
        del most[len(most) // 2 :]
    return groups


def _arrange(pairs: list[list[np.ndarray]], layout: Layout, pad_token_id: int) -> tuple[dict, list[list[np.ndarray]]]:
    """Model inputs, and for each row of each pair the flat positions of its tokens.

    Padded, the first rows of all pairs come first, then all second rows, and so on.
    """
    if layout != "padded":
        ids, position_ids, segments, places = pack(pairs, share=layout == "shared_prefix")
        return {"input_ids": ids, "position_ids": position_ids, "segments": segments}, places
    rows = [pair[side] for side in range(len(pairs[0])) for pair in pairs]
    ids, mask = _pad(rows, pad_token_id)
    width = ids.shape[1]
    places = [
        [np.arange(len(row)) + width * (side * len(pairs) + i) for side, row in enumerate(pair)]
        for i, pair in enumerate(pairs)
    ]
    return {"input_ids": ids, "attention_mask": mask}, places


def _before_responses(places: list[np.ndarray], starts: list[int]) -> torch.Tensor:
    """Flat positions before each token from `start` on, of every row: (T,) long."""
    return torch.from_numpy(
        np.concatenate([place[start - 1 : -1] for place, start in zip(places, starts, strict=True)])
    )


def _pad(rows: Sequence[np.ndarray], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths -> input_ids and attention_mask, both (rows, longest) long."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
