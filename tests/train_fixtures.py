"""Tiny random models and preference rows for the training tests; nothing is downloaded."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

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
    path: Path,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = True,
    vocab: int = 384,
    seed: int = 0,
    family: str = "qwen2",
    **config,
) -> Path:
    """A random causal LM of a family with its tokenizer, saved to `path`; biases and norms are random too."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | config))
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


def write_cache(path: Path, rows: list[dict], student_path: Path, teacher_path: Path, top_k: int) -> Path:
    """The cache of the rows, with what transformers says of the teacher; the command that makes it is not run."""
    from distiller.logprob_cache import CacheInfo, TokenLogprobs, write_shard
    from distiller.tokens import tokenizer_fingerprint
    from RewardTrainer.train.data import encode_pairs

    student, teacher = (AutoTokenizer.from_pretrained(place) for place in (student_path, teacher_path))
    lm = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float32).eval()
    cached = []
    for pair in encode_pairs(rows, student, teacher, "teacher_response")[0]:
        ids, start = pair["teacher_input_ids"], pair["teacher_response_start"]
        with torch.no_grad():
            logits = lm(input_ids=torch.from_numpy(ids).long()[None]).logits[0, start - 1 : -1]
        logprobs = logits.log_softmax(-1)  # (n, V)
        top = logprobs.topk(top_k)
        own = logprobs.gather(1, torch.from_numpy(ids[start:]).long()[:, None])[:, 0]
        arrays = (ids[start:], own.numpy(), top.indices.int().numpy(), top.values.numpy())
        cached.append((pair["id"], TokenLogprobs.measured(ids[:start], *arrays)))
    path.mkdir()
    info = CacheInfo(top_k, lm.config.vocab_size, str(teacher_path), tokenizer_fingerprint(student))
    write_shard(path / "logprobs-00000.safetensors", info, cached)
    return path


def make_trainer(
    student_path: Path, output_dir: Path, rows: list[dict], teacher_path: Path | None = None, **arguments
):
    """A `DistilTrainer` on the CPU as `run_reward_train.py` builds it; `eval_rows`, `callbacks` and `cached` (the
    directory of the teacher's log-probabilities, instead of the live teacher) with `kl_tail` are its own."""
    from transformers import set_seed

    from distiller.logprob_cache import LogprobCache
    from RewardTrainer.train.arguments import DistilConfig
    from RewardTrainer.train.batches import PairCollator
    from RewardTrainer.train.cached_teacher import CachedTeacher
    from RewardTrainer.train.checkpoint import load_student, load_tokenizer
    from RewardTrainer.train.data import encode_pairs
    from RewardTrainer.train.losses import check_weights
    from RewardTrainer.train.student import LiveTeacher, choose_layout
    from RewardTrainer.train.trainer import DistilTrainer, generative_field
    from RewardTrainer.train.vocabulary import match_vocabularies

    eval_rows, callbacks = arguments.pop("eval_rows", None), arguments.pop("callbacks", None)
    cached, kl_tail = arguments.pop("cached", None), arguments.pop("kl_tail", "bucket")
    if cached is not None:
        cached = CachedTeacher(LogprobCache(cached), kl_tail)
    args = DistilConfig(
        output_dir=str(output_dir),
        **({"disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 4, "seed": 3} | arguments),
    )
    set_seed(args.seed)
    sft_weight, kl_weight = check_weights(args.loss_type, args.sft_weight, args.kl_weight, args.margin_scale)
    generative = generative_field(args.loss_type, sft_weight, kl_weight)
    tokenizer = load_tokenizer(str(student_path))
    teacher = shared = teacher_tokenizer = None
    if kl_weight and teacher_path is not None:
        teacher_tokenizer = load_tokenizer(str(teacher_path))
        if cached is None:
            teacher = LiveTeacher.load(str(teacher_path), args.device, dtype=torch.float32)
        sizes = (AutoConfig.from_pretrained(path).vocab_size for path in (student_path, teacher_path))
        shared = match_vocabularies(tokenizer, teacher_tokenizer, *sizes).shared

    def encode(rows: list[dict]) -> list[dict]:
        return encode_pairs(rows, tokenizer, teacher_tokenizer, generative)[0]

    student = load_student(str(student_path), tokenizer, language_head=generative is not None).to(args.device)
    return DistilTrainer(
        model=student,
        args=args,
        teacher=cached or teacher,
        shared_ids=shared,
        train_dataset=encode(rows),
        eval_dataset=encode(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        data_collator=PairCollator(
            tokenizer.pad_token_id,
            layout=choose_layout("student", student.backbone, args.layout),
            teacher_layout="padded" if teacher is None else choose_layout("teacher", teacher.backbone, args.layout),
            cached_teacher=cached,
        ),
        callbacks=callbacks,
    )
