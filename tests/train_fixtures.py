"""Tiny random models and preference rows for the training tests; nothing is downloaded."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("red", "green", "blue", "seven", "eight", "stone", "river", "cloud", "iron", "paper")


def tiny_tokenizer(pad: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template; eos <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4 + ["user assistant system"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token=pad)
    fast.chat_template = CHATML
    return fast


def tiny_model(
    path: Path, hidden: int = 32, layers: int = 2, tied: bool = True, vocab: int = 384, seed: int = 0, **config
) -> Path:
    """A random Qwen2 causal LM with its tokenizer, saved to `path`. Biases and norms are random too, so that all of them count."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pair_rows(count: int, seed: int = 0) -> list[dict]:
    """Scored rows whose texts have many different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        number = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=generator).tolist())

    rows = []
    for i in range(count):
        rejected_score = float(torch.randint(2, 7, (1,), generator=generator))
        margin = 0.5 * float(torch.randint(1, 7, (1,), generator=generator))
        rows.append(
            {
                "id": f"row-{seed}-{i}",
                "prompt": f"name {words(1, 6)}",
                "chosen": words(1, 12),
                "rejected": words(1, 12),
                "teacher_response": words(1, 12),
                "chosen_score": rejected_score + margin,
                "rejected_score": rejected_score,
                "margin": margin,
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
