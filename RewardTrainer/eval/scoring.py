"""Rewards from any Hugging Face sequence-classification model.

One conversation, one reward: the logit of the last token that is not padding, as transformers pools it. What usually
goes wrong here, and what is done about it:

1. *A head that was never trained.* `AutoModelForSequenceClassification` fills missing weights with random numbers and
   only warns; a plain causal LM then scores like a coin. Missing weights are refused.
2. *Two labels.* Comparing rewards needs one number; a two-label model is refused, not indexed.
3. *Template.* The tokenizer's own chat template renders the conversation, once; a tokenizer without one is refused.
   The rendered text is tokenized without special tokens, because the template has already written them (a second BOS
   moves every score).
4. *Scores that move with the batch.* Batches are padded here, always on the right and only to their longest row: a
   causal model cannot see the padding from before it, an encoder is kept from it by the mask. Neither the tokenizer's
   `padding_side` nor the batch size matters.
5. *No pad token.* transformers refuses batches then. It pools by `config.pad_token_id`, and for a single row without
   one it takes the last token. The same is had in a batch by padding with a token that ends none of its rows
   (`choose_pad_id`).
6. *Truncation.* Only from the left: the oldest part of the prompt goes, the end of the response never. It is counted.
7. *bf16.* A score head in bf16 rounds rewards to 8 bits and makes ties of real differences, so a linear `score` head
   runs in fp32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distiller.records import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Encoded:
    """One conversation, ready for the model."""

    ids: list[int]
    """Token ids, no padding."""
    truncated: bool
    """The left end was cut off to fit `max_length`."""
    response_cut: bool
    """The response alone is longer than `max_length`, so the cut also took its beginning."""


class Scorer:
    """A reward model and its tokenizer. `encode` turns conversations into token ids, `score` turns token ids into
    rewards."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        tokens_per_batch: int = 16384,
    ) -> None:
        """
        Args:
            model: a sequence-classification model with num_labels 1, on the device where it is to run
            tokenizer: its tokenizer, with a chat template
            max_length: longest conversation in tokens; None is what model and tokenizer declare
            tokens_per_batch: largest rows x longest row of one batch; a longer row makes a batch of its own

        Raises:
            InputError: no chat template, or a max_length the model cannot take
        """
        if not tokenizer.chat_template:
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template. A reward model scores conversations "
                "in the format of its training; save that template (chat_template.jinja) beside the model."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokens_per_batch = tokens_per_batch
        self.max_length = _resolve_max_length(model, tokenizer, max_length)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation as one text, special tokens included.

        Raises:
            InputError: the template refuses the conversation (a system message, say, where it allows none)
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error

    def encode(self, texts: Sequence[str], responses: Sequence[str]) -> list[Encoded]:
        """Rendered conversations to token ids, cut from the left where they are longer than `max_length`.

        A BOS at the start survives the cut.

        Args:
            texts: what `render` gave
            responses: the response each of them ends with; only read to tell whether the cut reached it
        """
        if not texts:
            return []
        encoded = []
        for ids, response in zip(self._tokenize(texts), responses, strict=True):
            if len(ids) <= self.max_length:
                encoded.append(Encoded(ids, truncated=False, response_cut=False))
                continue
            has_bos = ids[0] == self.tokenizer.bos_token_id and self.max_length > 1
            kept = [ids[0], *ids[-(self.max_length - 1) :]] if has_bos else ids[-self.max_length :]
            response_cut = len(self._tokenize([response])[0]) > self.max_length
            encoded.append(Encoded(kept, truncated=True, response_cut=response_cut))
        return encoded

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self.tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return batch["input_ids"]

    @torch.inference_mode()
    def score(self, sequences: Sequence[list[int]], progress: str | None = None) -> list[float]:
        """Rewards of token sequences, in their order.

        Args:
            sequences: token ids of one conversation each, none empty
            progress: label of a progress bar on stderr; None shows none

        Raises:
            InputError: token ids outside the model's vocabulary, or a reward that is not finite
        """
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
        rewards = torch.empty(len(sequences), dtype=torch.float64)
        batches = plan_batches([len(ids) for ids in sequences], self.tokens_per_batch)
        bar = tqdm(total=len(sequences), desc=progress, unit="response", file=sys.stderr, disable=progress is None)
        for indices in batches:
            rewards[indices] = self._forward([sequences[index] for index in indices])
            bar.update(len(indices))
        bar.close()
        if not torch.isfinite(rewards).all():
            count = int((~torch.isfinite(rewards)).sum())
            raise InputError(f"{count} of {len(rewards)} rewards are not finite; try --dtype float32 or bfloat16")
        return rewards.tolist()

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        config = self.model.config.get_text_config()
        pad_id = config.pad_token_id
        if pad_id is None:
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
        return logits[:, 0].double().cpu()


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
    tokens_per_batch: int = 16384,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Scorer:
    """Load a reward model from a directory or the hub, onto the GPU if there is one.

    Args:
        name: local directory or hub id; safetensors weights
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU, float32 on a CPU
        max_length, tokens_per_batch: see `Scorer`
        attn_implementation: "eager", "sdpa", ... ; None is the model's default
        trust_remote_code: run Python code that comes with the model

    Raises:
        InputError: it cannot be loaded, is no one-label sequence-classification model, or has weights missing
    """
    _check_directory(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    if trust_remote_code:
        print(f"trust_remote_code: Python code shipped with {name} will run on this machine.", file=sys.stderr)
    config = _from_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    if config.num_labels != 1:
        raise InputError(
            f"{name}: num_labels is {config.num_labels}, a reward model has 1 (architecture {config.architectures}; a "
            "config that does not say is read as 2, so a language model without a reward head ends here too)."
        )
    tokenizer = _from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    model, loading = _from_pretrained(
        AutoModelForSequenceClassification,
        name,
        config=config,
        dtype=DTYPES[dtype],
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{name}: the checkpoint lacks {_shown(missing)}; transformers fills them with random numbers, so every "
            "score would be chance. Is this a language model without a reward head, or has it a head of another kind "
            "(--trust_remote_code, if it brings its own code and you trust it)?"
        )
    if loading["unexpected_keys"]:
        print(
            f"note: weights in {name} that this model does not use: {_shown(sorted(loading['unexpected_keys']))}",
            file=sys.stderr,
        )
    model.to(device)
    _run_head_in_fp32(model)
    return Scorer(model, tokenizer, max_length, tokens_per_batch)


def _from_pretrained(loader: type, name: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name}: cannot be loaded as a reward model: {error}") from error


def _check_directory(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            remedy = (
                "merge the LoRA adapter into its base first"
                if adapter
                else "give the directory the model was saved to"
            )
            raise InputError(f"{name}: the directory holds no config.json; {remedy}.")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count(os.sep) > 1:
        raise InputError(
            f"{name}: no such directory. Train a reward model first (bash scripts/train_distilrm.sh), or give "
            "--model; relative paths start at the current directory."
        )


def _shown(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _run_head_in_fp32(model: PreTrainedModel) -> None:
    """Let a linear `score` head (the name all decoder architectures use) see and give fp32."""
    head = dict(model.named_children()).get("score")
    if isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def _resolve_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int:
    """The asked length, or the smaller of what config and tokenizer declare (either may declare nothing)."""
    positions = model.config.get_text_config().to_dict().get("max_position_embeddings") or sys.maxsize
    limit = min(positions, int(min(tokenizer.model_max_length, sys.maxsize)))
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise InputError(f"--max_length {asked}: {model.name_or_path} takes 1 to {limit} tokens")
    return asked
