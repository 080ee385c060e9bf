"""From conversations to token ids, the same for every engine that takes tokens.

1. *Template.* The tokenizer's own chat template renders the conversation, once; a tokenizer without one is refused.
   The rendered text is tokenized without special tokens, because the template has already written them (a second BOS
   moves every score).
2. *Truncation.* Only from the left: the oldest part of the prompt goes, the end of the response never. It is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distiller.records import InputError
from RewardTrainer.eval.engines.base import Conversation, Encoded
from RewardTrainer.packing import common_prefix

AT_ONCE = 2000
"""Conversations rendered and tokenized at a time: their texts and ids need not all be in memory twice."""


class ChatEncoder:
    """A tokenizer with a chat template, and a longest length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Raises InputError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template. A reward model scores conversations "
                "in the format of its training; save that template (chat_template.jinja) beside the model."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length

    def render(self, messages: Conversation) -> str:
        """The conversation as one text, special tokens included.

        Raises:
            InputError: the template refuses the conversation (a system message, say, where it allows none)
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error

    def encode(self, rows: Sequence[Sequence[Conversation]]) -> list[list[Encoded] | InputError]:
        """See `Engine.encode`. A conversation longer than `max_length` is cut from the left; a BOS at its start
        survives the cut."""
        encoded: list[list[Encoded] | InputError] = []
        for start in range(0, len(rows), AT_ONCE):
            encoded += self._encode(rows[start : start + AT_ONCE])
        return encoded

    def _encode(self, rows: Sequence[Sequence[Conversation]]) -> list[list[Encoded] | InputError]:
        rendered: list[list[str] | InputError] = []
        for row in rows:
            try:
                rendered.append([self.render(conversation) for conversation in row])
            except InputError as refusal:
                rendered.append(refusal)
        texts = [text for row in rendered if isinstance(row, list) for text in row]
        ids = iter(self._tokenize(texts))
        return [
            texts if isinstance(texts, InputError) else [self._cut(next(ids), messages) for messages in row]
            for row, texts in zip(rows, rendered, strict=True)
        ]

    def _cut(self, ids: list[int], messages: Conversation) -> Encoded:
        if len(ids) <= self.max_length:
            return Encoded(len(ids), tuple(ids))
        has_bos = ids[0] == self.tokenizer.bos_token_id and self.max_length > 1
        kept = [ids[0], *ids[-(self.max_length - 1) :]] if has_bos else ids[-self.max_length :]
        before = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        (prompt,) = self._tokenize([before])
        lost = len(ids) - len(kept) + has_bos  # where what is kept begins, but for BOS
        response_cut = lost > common_prefix([np.array([*prompt, -1]), np.array(ids)])
        return Encoded(len(kept), tuple(kept), truncated=True, response_cut=response_cut)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return batch["input_ids"]


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest row that a model takes: the smaller of what config and tokenizer declare."""
    # By attribute: GPT-2 and others store it under another name. XLNet says -1: any length.
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return min(positions if positions > 0 else sys.maxsize, int(min(tokenizer.model_max_length, sys.maxsize)))


def resolve_max_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int:
    """The asked length, or the smaller of what config and tokenizer declare (either may declare nothing).

    Raises:
        InputError: more than the model takes is asked for
    """
    limit = longest_input(config, tokenizer)
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise InputError(f"--max_length {asked}: {tokenizer.name_or_path} takes 1 to {limit} tokens")
    return asked
