"""Small random backbones of the families that take packed rows."""

import copy

import torch
from transformers import (
    AutoModel,
    Cohere2Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "llama": LlamaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=512),
    # Windows that the prompts below outgrow: a branch must not see further back than in a row of its own.
    "gemma2 window": Gemma2Config(**SHAPE, head_dim=8, sliding_window=7),
    "qwen2 window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "mistral window": MistralConfig(**SHAPE, sliding_window=6),
    "cohere2 window": Cohere2Config(**SHAPE, sliding_window=6),
}


def build(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build_deep(dtype: torch.dtype) -> torch.nn.Module:
    """36 layers in a 3B model's proportions, with weights as they are drawn before training."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 1}
    return Qwen2Model(Qwen2Config(vocab_size=1000, num_hidden_layers=36, **shape)).to(dtype).eval()
