"""A reward model with an MLP head: `AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)`.

The class name ends in ForSequenceClassification and the head is called `classifier` because vLLM goes by both.
This file is copied into every checkpoint trained with `--head mlp` and stands alone. The classes of `transformers`
have a linear head only, and loading such a checkpoint as one of them would leave the head at random values.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class MLPHead(nn.Sequential):
    """Linear - ReLU - Linear: (rows, H) -> (rows, labels)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # vLLM's Transformers backend hands over (rows, 1, H), as to heads that pick the first token themselves.
        hidden = hidden.squeeze(1) if hidden.dim() == 3 else hidden
        return super().forward(hidden.to(self[0].weight.dtype))  # in here: peft puts a wrapper around the head


class MLPRewardForSequenceClassification(PreTrainedModel):
    """Any backbone, then Linear - ReLU - Linear on the hidden state of the last token that is not padding."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    # Attention is the backbone's own affair, which checks what it supports when it is built.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AutoModel.from_config(config)
        width = config.reward_head_width
        self.classifier = MLPHead(nn.Linear(config.hidden_size, width), nn.ReLU(), nn.Linear(width, config.num_labels))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """(rows, L) token ids, padded on either side -> logits (rows, num_labels)."""
        kwargs.pop("labels", None)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        positions = torch.arange(input_ids.shape[1], device=hidden.device)
        last = (positions * (input_ids != self.config.pad_token_id)).argmax(-1)  # (rows,)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]  # (rows, H)
        return SequenceClassifierOutputWithPast(logits=self.classifier(pooled))
