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
   runs in fp32.
4. *Waste.* Rows of similar length go together, so many as fit a number of tokens, and the prompt that a row's
   responses share is computed once (`sharing.py`) by models that were seen to give the same rewards that way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distiller.records import InputError
from RewardTrainer.eval.engines.base import Encoded
from RewardTrainer.eval.engines.encoding import ChatEncoder, resolve_max_length
from RewardTrainer.eval.engines.loading import load_config, load_model, resolve_dtype
from RewardTrainer.eval.engines.sharing import LONGEST_SHARED, Unit, branch_mask, pack, plan_row, unit

HEADS = ("score", "classifier")
"""Names under which models keep the head that turns hidden states into rewards."""
CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Tokens of a batch: what a CPU's caches hold (benchmarks/eval_rm.py), what keeps a GPU busy."""


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
            tokens_per_batch: largest rows x longest row of one batch; a longer row makes a batch of its own. None:
                `CPU_TOKENS` or `GPU_TOKENS`
            share_prompts: compute a shared prompt once, where the model allows it

        Raises:
            InputError: no chat template, or a max_length the model cannot take
        """
        super().__init__(tokenizer, resolve_max_length(model.config, tokenizer, max_length))
        self.model = model.eval()
        self.model.config.use_cache = False
        self.tokens_per_batch = tokens_per_batch or (CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS)
        self.shares_prompts = share_prompts and can_share_prompts(self)

    def score(self, rows: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, int, float]]:
        """See `Engine.score`.

        Raises:
            InputError: token ids outside the model's vocabulary, or a reward that is not finite
        """
        self._check(rows)
        units = self.plan(rows)
        for indices in plan_batches([part.length for part in units], self.tokens_per_batch):
            batch = [units[index] for index in indices]
            rewards = self.forward(batch).tolist()
            for (row, number), reward in zip((key for part in batch for key in part.keys), rewards, strict=True):
                yield row, number, reward

    def plan(self, rows: Sequence[Sequence[Encoded]]) -> list[Unit]:
        """The sequences to run."""
        units = []
        for row, conversations in enumerate(rows):
            sequences = [conversation.ids for conversation in conversations]
            if self.shares_prompts:
                width = self.model.config.get_text_config().hidden_size
                units += plan_row(row, sequences, width, min(self.tokens_per_batch, LONGEST_SHARED))
            else:
                units += [unit(row, [number], sequences) for number in range(len(sequences))]
        return units

    @torch.inference_mode()
    def forward(self, units: Sequence[Unit]) -> torch.Tensor:
        """Rewards of the units' branches in one batch, (branches,) float64 on the CPU."""
        if all(len(part.branches) == 1 for part in units):
            logits = self._forward_rows([[*part.prefix, *part.branches[0]] for part in units])
        else:
            logits = self._forward_branches(units)
        rewards = logits.double().cpu()
        if not torch.isfinite(rewards).all():
            count = int((~torch.isfinite(rewards)).sum())
            raise InputError(f"{count} of {len(rewards)} rewards are not finite; try --dtype float32 or bfloat16")
        return rewards

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

    def _forward_branches(self, units: Sequence[Unit]) -> torch.Tensor:
        ids, positions, branch_of, rows, columns = pack(units, self.model.config.get_text_config().pad_token_id)
        device = self.model.device
        hidden = self.model.base_model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=branch_mask(branch_of.to(device), self.model.dtype),
            use_cache=False,
        ).last_hidden_state  # (B, T, hidden)
        head = reward_head(self.model)
        read = hidden[rows.to(device), columns.to(device)]  # (branches, hidden)
        return head(read.to(next(head.parameters()).dtype))[:, 0]

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


def can_share_prompts(scorer: Scorer) -> bool:
    """Whether the model gives branches of a shared prompt the rewards it gives them alone.

    It must take a mask of its own (eager and sdpa attention do), let every token see all before it (a window or a
    recurrence is not in the mask), and then show it on a probe: two branches together against each alone.
    """
    model = scorer.model
    config = model.config.get_text_config().to_dict()
    layers = set(config.get("layer_types") or ["full_attention"])
    layers |= {"local"} & set(config.get("attention_layers") or ())  # GPT-Neo's name for windows
    if (
        reward_head(model) is None
        or model.config.is_encoder_decoder
        or model.config.get_text_config()._attn_implementation not in ("eager", "sdpa")
        or layers != {"full_attention"}
        or (config.get("sliding_window") and config.get("use_sliding_window", True))
    ):
        return False
    size = min(scorer.max_length, 24)
    tokens = [3 + 7 * n % max(1, model.get_input_embeddings().weight.shape[0] - 3) for n in range(2 * size)]
    tokens = [token for token in tokens if token != model.config.get_text_config().pad_token_id]
    half = size // 2
    sequences = [(*tokens[:half], *tokens[half : half + 5]), (*tokens[:half], *tokens[half + 5 : half + 12])]
    sequences = [ids for ids in sequences if len(ids) > half]
    if half < 1 or len(sequences) < 2:
        return False
    together = [unit(0, [0, 1], sequences)]
    alone = [unit(0, [number], sequences) for number in (0, 1)]
    try:
        shared, plain = scorer.forward(together), scorer.forward(alone)
    except (InputError, RuntimeError, TypeError, ValueError, IndexError):  # a model that takes no such mask
        return False
    exact = model.dtype == torch.float32
    return torch.allclose(shared, plain, rtol=1e-4 if exact else 5e-2, atol=1e-4 if exact else 5e-2)


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Row indices grouped so that rows x longest row stays within `tokens_per_batch`; rows of similar length together.

    Longest first, so that a batch too large for the device fails at once and not after an hour.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > tokens_per_batch:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
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
    config, tokenizer = load_config(name, trust_remote_code)
    model = load_model(name, config, dtype, attn_implementation, trust_remote_code)
    model.to(device)
    run_head_in_fp32(model)
    return Scorer(model, tokenizer, max_length, tokens_per_batch, share_prompts)


def run_head_in_fp32(model: PreTrainedModel) -> None:
    """Let a linear `score` head (the name all decoder architectures use) see and give fp32."""
    head = dict(model.named_children()).get("score")
    if isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
