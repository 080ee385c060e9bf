"""A tiny random reward model with a byte-level BPE tokenizer, and benchmark files, for the evaluation tests."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
ENDS_IN_END_TOKEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
TEXTS = [
    "The colour of the boat is red and its metal is tin.",
    "user assistant system",
    "Name the metal, please. # Notes",
]


def build_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `<s>` in front of whatever it tokenizes with special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    positions: int = 512,
    pad_token_id: int | None = 0,
    seed: int = 0,
    hidden_size: int = 32,
) -> Qwen2ForSequenceClassification:
    """Qwen2 of two layers; weights large enough for rewards to differ between texts."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.3,
        num_labels=1,
        problem_type="regression",
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForSequenceClassification(config).eval()


def save_reward_model(directory: Path, **options) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    build_model(tokenizer, **options).save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: list) -> Path:
    """Rows are objects, or strings that become a line as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair(number: int, **more) -> dict:
    return {
        "id": f"row{number}",
        "prompt": f"Name metal {number}.",
        "chosen": f"The metal is tin {'x' * (number % 5)}.",
        "rejected": f"Metal {number} is red.",
        **more,
    }


def styled(number: int, **more) -> dict:
    metals = ["tin", "The metal of the boat is tin.", "# Notes\n* metal: tin"]
    reds = ["red", "The metal of the boat is red.", "# Notes\n* metal: red"]
    return {"id": number, "prompt": f"Name the metal of boat {number}.", "chosen": metals, "rejected": reds, **more}
