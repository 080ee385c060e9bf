"""Rewards from any Hugging Face sequence-classification model.

One conversation, one reward: the logit of the last token that is not padding, as transformers pools it. What usually
goes wrong here, and what is done about it (what must hold before a model is run: `loading.py`; templates and
truncation: `encoding.py`):

1. *Scores that move with the batch.* Batches are padded here, always on the right and only to their longest row: a
   causal model cannot see the padding from before it, an encoder is kept from it by the mask. Neither the tokenizer's
   `padding_side` nor the batch size matters.
2. *No pad token.* transformers refuses batches then. It pools by `config.pad_token_id`, and for a single row without
   one it takes the last token. The same is had in a batch by padding with a token that ends none of its rows
   (`choose_pad_id`).
3. *bf16.* A score head in bf16 rounds rewards to 8 bits and makes ties of real differences, so a linear `score` head
   runs in fp32, with the weights that were saved.
4. *Waste.* Rows lie end to end without padding, so many as fit a number of tokens, and what a row's responses begin
   with is computed once (`RewardTrainer/packing.py`), by models that were seen to give the same states that way. Equal
   conversations of a row are one, and get one reward. Other models take padded rows of similar length.
5. *Waiting.* A batch's rewards are read when the next one is under way, so that a GPU never waits for them to be read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distiller.records import InputError
from RewardTrainer.eval.engines.base import Encoded
from RewardTrainer.eval.engines.encoding import ChatEncoder, resolve_max_length
from RewardTrainer.eval.engines.loading import check_attention, load_config, load_model, resolve_dtype
from RewardTrainer.fused_layers import use_fused_layers
from RewardTrainer.memory import memory_for, weights_gib
from RewardTrainer.packing import no_plans_by_shape, pack, packed_length, run_packed, to_device
from RewardTrainer.packing_trial import Verdict, judge

HEADS = ("score", "classifier")
"""Names under which models keep the head that turns hidden states into rewards."""
CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Tokens of a batch: what a CPU's caches hold (benchmarks/eval_rm.py), what keeps a GPU busy."""

LESS_MEMORY = "Less is needed with smaller --tokens_per_batch, --dtype bfloat16, or a smaller --max_length."


class Unit(NamedTuple):
    """Conversations of one row that are run together."""

    row: int
    numbers: range
    """Which of the row's."""
    length: int
    """Tokens that are run for them."""


class Scorer(ChatEncoder):
    """A reward model and its tokenizer; an `Engine`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        share_prompts: bool = True,
    ) -> None:
        """
        Args:
            model: a sequence-classification model with num_labels 1, on the device where it is to run
            tokenizer: its tokenizer, with a chat template
            max_length: longest conversation in tokens; None is what model and tokenizer declare
            tokens_per_batch: most tokens of one batch, padding included; a longer conversation makes a batch of its
                own. None: `CPU_TOKENS` or `GPU_TOKENS`
            share_prompts: compute once what a row's conversations begin with, where the model allows it

        Raises:
            InputError: no chat template, or a max_length the model cannot take
        """
        super().__init__(tokenizer, resolve_max_length(model.config, tokenizer, max_length))
        self.model = model.eval()
        self.model.config.use_cache = False
        self.tokens_per_batch = tokens_per_batch or (CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS)
        verdict = judge_scorer(model)
        self.packs = verdict.reason is None
        self.shares_prompts = share_prompts and self.packs
        self.layout = ("prompts shared, " if self.shares_prompts else "no padding, ") + verdict.note
        if not self.packs:
            self.layout = f"rows padded, because {verdict.reason}"

    def score(self, rows: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, int, float]]:
        """See `Engine.score`.

        Raises:
            InputError: token ids outside the model's vocabulary, or a reward that is not finite
        """
        self._check(rows)
        units = self.plan(rows)
        waiting: tuple[list[Unit], Later] | None = None
        for indices in plan_batches([unit.length for unit in units], self.tokens_per_batch, padded=not self.packs):
            batch = [units[index] for index in indices]
            tokens = sum(unit.length for unit in batch)
            with memory_for(f"a batch of {len(batch)} rows, {tokens} tokens", LESS_MEMORY, self.model.device):
                rewards = Later(self.forward(rows, batch))
            if waiting is not None:
                yield from _read(*waiting)
            waiting = batch, rewards
        if waiting is not None:
            yield from _read(*waiting)

    def plan(self, rows: Sequence[Sequence[Encoded]]) -> list[Unit]:
        """What to run together at least: a row's conversations, so many as fit a batch, where they share; else one."""
        units = []
        for row, conversations in enumerate(rows):
            sequences = [np.array(conversation.ids) for conversation in conversations]
            start = 0
            while start < len(sequences):
                stop = len(sequences) if self.shares_prompts else start + 1
                length = packed_length(sequences[start:stop], share=True)
                while stop - start > 1 and length > self.tokens_per_batch:
                    stop = (start + stop) // 2
                    length = packed_length(sequences[start:stop], share=True)
                units.append(Unit(row, range(start, stop), length))
                start = stop
        return units

    @torch.no_grad()
    def forward(self, rows: Sequence[Sequence[Encoded]], units: Sequence[Unit]) -> torch.Tensor:
        """Rewards of the units' conversations in one batch, in their order, on the model's device."""
        groups = [[np.array(rows[unit.row][number].ids) for number in unit.numbers] for unit in units]
        if self.packs:
            return self._forward_packed(groups)
        return self._forward_rows([sequence.tolist() for group in groups for sequence in group])

    def _forward_packed(self, groups: list[list[np.ndarray]]) -> torch.Tensor:
        ids, position_ids, segments, places = pack(groups, share=self.shares_prompts)
        pad_id = self.model.config.get_text_config().pad_token_id
        read = [
            place[_last_token(sequence, pad_id)]
            for group, where in zip(groups, places, strict=True)
            for sequence, place in zip(group, where, strict=True)
        ]
        # Each place once: a product rounds its rows differently, by where they stand, and equal ones must stay equal.
        read, again = (torch.from_numpy(part) for part in np.unique(read, return_inverse=True))
        device = self.model.device
        ids, position_ids, read, again = (to_device(part, device) for part in (ids, position_ids, read, again))
        hidden = run_packed(self.model.base_model, ids, position_ids, segments)[0]  # (N, hidden)
        head = reward_head(self.model)
        return head(hidden[read].to(next(head.parameters()).dtype))[:, 0][again]

    def _forward_rows(self, rows: list[list[int]]) -> torch.Tensor:
        config = self.model.config.get_text_config()
        pad_id = config.pad_token_id
        if pad_id is None or not 0 <= pad_id < self.model.get_input_embeddings().weight.shape[0]:
            pad_id = choose_pad_id(rows)
        longest = max(len(row) for row in rows)
        input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])  # (B, T)
        attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])  # (B, T)
        declared, config.pad_token_id = config.pad_token_id, pad_id
        try:
            logits = self.model(
                input_ids=input_ids.to(self.model.device), attention_mask=attention_mask.to(self.model.device)
            ).logits  # (B, 1)
        finally:
            config.pad_token_id = declared
        if logits.shape != (len(rows), 1):
            raise InputError(f"the model returns logits of shape {tuple(logits.shape)}, not ({len(rows)}, 1)")
        return logits[:, 0]

    def _check(self, rows: Sequence[Sequence[Encoded]]) -> None:
        sequences = [conversation.ids for row in rows for conversation in row]
        largest_id = max((max(ids) for ids in sequences), default=0)
        if largest_id >= self.model.get_input_embeddings().weight.shape[0]:
            raise InputError(
                f"the tokenizer makes token id {largest_id}, unknown to the model: they do not belong together"
            )
        pad_id = self.model.config.get_text_config().pad_token_id
        ending_in_pad = sum(ids[-1] == pad_id for ids in sequences)
        if ending_in_pad:
            print(
                f"note: {ending_in_pad} of {len(sequences)} conversations end in the model's pad token ({pad_id}). "
                "Scored as transformers does, by the token before it; other software may take the last token.",
                file=sys.stderr,
            )


def reward_head(model: PreTrainedModel) -> nn.Module | None:
    """The head on the hidden states, under one of the names models give it."""
    children = dict(model.named_children())
    return next((children[name] for name in HEADS if name in children), None)


def judge_scorer(model: PreTrainedModel) -> Verdict:
    """Whether the model takes packed rows: its backbone must, and its head must be ours to call."""
    if reward_head(model) is None or model.config.is_encoder_decoder:
        return Verdict(f"{type(model).__name__} is no decoder with a head of a known name ({', '.join(HEADS)})")
    return judge(model.base_model, runnable=True)


def _last_token(sequence: np.ndarray, pad_id: int | None) -> int:
    """Where the reward is read: the last token that is not padding, as transformers pools."""
    tokens = np.flatnonzero(sequence != (-1 if pad_id is None else pad_id))
    return int(tokens[-1]) if len(tokens) else 0


class Later:
    """A tensor on its way to the host, which waits for that tensor alone, not for what was begun after it."""

    def __init__(self, values: torch.Tensor):
        self.event = None
        self.values = values.double()
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=torch.double, pin_memory=True)
            self.values.copy_(values.double(), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> torch.Tensor:
        """float64, on the host."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def _read(units: Sequence[Unit], rewards: Later) -> Iterator[tuple[int, int, float]]:
    """Raises InputError for rewards that are not finite."""
    values = rewards.read()
    if not torch.isfinite(values).all():
        count = int((~torch.isfinite(values)).sum())
        raise InputError(f"{count} of {len(values)} rewards are not finite; try --dtype float32 or bfloat16")
    keys = ((unit.row, number) for unit in units for number in unit.numbers)
    yield from ((row, number, value) for (row, number), value in zip(keys, values.tolist(), strict=True))


def plan_batches(lengths: Sequence[int], tokens_per_batch: int, padded: bool) -> list[list[int]]:
    """Indices grouped so that a group's tokens, padded to its longest or not, stay within `tokens_per_batch`.

    Longest first, so that a batch too large for the device fails at once and not after an hour, and rows of similar
    length are together.
    """
    batches: list[list[int]] = []
    tokens = longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        more = longest if padded and batches else lengths[index]
        if not batches or tokens + more > tokens_per_batch:
            batches.append([])
            tokens, longest = 0, lengths[index]
            more = longest
        batches[-1].append(index)
        tokens += more
    return batches


def choose_pad_id(rows: Sequence[list[int]]) -> int:
    """The smallest token id that ends none of the rows.

    transformers takes the rightmost token unequal to the pad id for the last one. With an id that ends no row, padding
    on the right is skipped and the true last token is pooled, as for each row alone.
    """
    endings = {row[-1] for row in rows}
    return next(token for token in range(len(endings) + 1) if token not in endings)


def load_scorer(
    name: str,
    dtype: str = "auto",
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    share_prompts: bool = True,
) -> Scorer:
    """Load a reward model from a directory or the hub, onto the GPU if there is one.

    Args:
        name: local directory or hub id; safetensors weights
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU, float32 on a CPU
        max_length, tokens_per_batch, share_prompts: see `Scorer`
        attn_implementation: "eager", "sdpa", ... ; None is the model's default
        trust_remote_code: run Python code that comes with the model

    Raises:
        InputError: it cannot be loaded, is no one-label sequence-classification model, or has weights missing
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(dtype, on_gpu=device.type == "cuda")
    check_attention(attn_implementation)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise InputError(f"--tokens_per_batch {tokens_per_batch}: must be at least 1")
    config, tokenizer = load_config(name, trust_remote_code)
    model = load_model(name, config, dtype, attn_implementation, trust_remote_code)
    with memory_for(f"{name}, {weights_gib(model):.1f} GiB", "Take --dtype bfloat16 or --engine vllm.", device):
        model.to(device)
    no_plans_by_shape()
    layers = use_fused_layers(model.base_model, device)
    run_head_in_fp32(model)
    with memory_for(f"{name}, tried on a few rows", LESS_MEMORY, device):
        scorer = Scorer(model, tokenizer, max_length, tokens_per_batch, share_prompts)
    print(f"{name}: {scorer.layout}; {layers}", file=sys.stderr)
    return scorer


def run_head_in_fp32(model: PreTrainedModel) -> None:
    """Let a linear `score` head (the name all decoder architectures use) see and give fp32."""
    head = dict(model.named_children()).get("score")
    if isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    elif head is not None:  # which was loaded in fp32
        head.to(model.dtype)
