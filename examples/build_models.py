"""Rebuilds the two models of the embedded world from a seed: examples/teacher and examples/student.

The teacher (0.9 M parameters) learns, through the example's own prompt files, what the method asks of a teacher: to
answer, to diagnose and minimally edit a draft, to score a pair, and to score its own edit. The student (0.4 M) is a
language model that only knows the text of the world: right answers in all styles, and answers that somebody looked
over. It has never seen a preference or a score.

    python examples/build_models.py teacher
    python examples/build_models.py student
"""

import argparse
import math
import random
import time
from pathlib import Path

import jinja2
import torch
import world
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [*world.VALUES, *sorted(world.WORDS), *world.THINGS]
PROMPT_FILES = {name: HERE / "prompts" / f"{name}.txt" for name in ("refine", "strength", "calibrate")}
PROMPTS = {name: jinja2.Template(path.read_text()) for name, path in PROMPT_FILES.items()}

# A conversation is a list of (role, text, learn): the loss falls on the assistant turns marked `learn`.
Conversation = list[tuple[str, str, bool]]


def verdicts(item: world.Item, facts: world.Facts) -> str:
    return ", ".join(f"{a} {'yes' if item.notes[a] == v else 'no'}" for a, v in facts) + "."


def facts_of(response: str) -> world.Facts:
    return list(world.stated(response).items())


def refine_reply(draft: str, edit: str) -> str:
    before, after = world.stated(draft), world.stated(edit)
    changed = ", ".join(f"{a} {v}" for a, v in after.items() if before[a] != v)
    diagnosis = f"Mend {changed}." if changed else "Nothing to mend."
    return f"<diagnosis>{diagnosis}</diagnosis>\n<refined>{edit}</refined>"


def answer(rng: random.Random, item: world.Item) -> Conversation:
    return [("user", item.prompt, False), ("assistant", item.teacher_answer(rng), True)]


def refine_and_calibrate(rng: random.Random, item: world.Item) -> Conversation:
    """A refinement and the score of the edit; in 40 % of the rows the edit is any edit, good or bad, only scored."""
    wrong = rng.randint(0, len(item.asked)) if rng.random() < 0.2 else rng.randint(1, len(item.asked))
    style = rng.randrange(3)
    draft = world.render(item.facts(rng, wrong), style)
    better = item.teacher_answer(rng)
    own = rng.random() < 0.6
    if own:
        edit = world.gold_edit(draft, better)
    else:
        edit = world.render(item.facts(rng, rng.randint(0, len(item.asked))), style)
    # What the draft got comes from the teacher's own two readings: near the truth, sometimes between two whole scores.
    got = world.score(world.quality(item.prompt, draft)) + (
        rng.choice((-1, -0.5, 0.5, 1)) if rng.random() < 0.3 else 0
    )
    score = world.score(world.quality(item.prompt, edit))
    return [
        ("user", PROMPTS["refine"].render(prompt=item.prompt, rejected=draft, teacher_response=better), False),
        ("assistant", refine_reply(draft, edit), own),
        ("user", PROMPTS["calibrate"].render(rejected_score=f"{min(10, max(1, got)):g}"), False),
        ("assistant", f"{verdicts(item, facts_of(edit))}\n<score>{score}</score>", True),
    ]


def strength(rng: random.Random, item: world.Item) -> Conversation:
    facts = [item.facts(rng, rng.randint(0, len(item.asked))) for _ in range(2)]
    texts = [world.render(each, rng.randrange(3)) for each in facts]
    scores = [world.score(world.quality(item.prompt, text)) for text in texts]
    reply = (
        f"A: {verdicts(item, facts[0])}\nB: {verdicts(item, facts[1])}\n"
        f"<score_a>{scores[0]}</score_a>\n<score_b>{scores[1]}</score_b>"
    )
    prompt = PROMPTS["strength"].render(prompt=item.prompt, response_a=texts[0], response_b=texts[1])
    return [("user", prompt, False), ("assistant", reply, True)]


def plain_answer(rng: random.Random, item: world.Item) -> Conversation:
    """What the student knows: right answers in any style of the world."""
    return [("user", item.prompt, False), ("assistant", world.render(item.truth, rng.randrange(3)), True)]


def checked_answer(rng: random.Random, item: world.Item) -> Conversation:
    """Text that looks an answer over: what lets a language model notice a wrong fact. The answer carries no loss."""
    facts = item.facts(rng, rng.randint(0, len(item.asked)))
    check = f"Looked over: {verdicts(item, facts)}"
    draft = world.render(facts, rng.randrange(3))
    return [("user", item.prompt, False), ("assistant", draft, False), ("assistant", check, True)]


def mended_answer(rng: random.Random, item: world.Item) -> Conversation:
    """The same look in an editor's words, which name only what is wrong."""
    facts = item.facts(rng, rng.randint(0, len(item.asked)))
    wrong = [attribute for attribute, value in facts if item.notes[attribute] != value]
    check = f"Looked over: {'mend ' + ', '.join(wrong) if wrong else 'nothing to mend'}."
    draft = world.render(facts, rng.randrange(3))
    return [("user", item.prompt, False), ("assistant", draft, False), ("assistant", check, True)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text round-trips, up to NFC) in which each word, with its space, is one token."""
    rng = random.Random(0)
    items = [world.Item(rng, world.VALUES, world.THINGS) for _ in range(400)]
    makers = (answer, refine_and_calibrate, strength, plain_answer)
    texts = [text for make in makers for item in items for _, text, _ in make(rng, item)]
    texts += [f" {word}" for word in WORDS for _ in range(50)] + ["user", "assistant", "system"] * 50
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096,
            min_frequency=30,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    split = [word for word in WORDS if len(tokenizer.encode(f" {word}").ids) != 1]
    assert not split, f"not single tokens: {split}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Qwen2ForCausalLM:
    heads = hidden // 32  # vLLM's CPU attention serves heads of 32
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.06,  # with the usual 0.02 a model this narrow takes far longer to learn to copy
            attn_implementation="eager",  # on a CPU, three times faster to train at these lengths than SDPA
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids of the rendered conversation, and which of them carry loss (the reply and its end of turn)."""
    ids, learn = [], []
    for role, text, learned in conversation:
        for piece, counts in ((f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", learned), ("\n", False)):
            tokens = tokenizer.encode(piece, add_special_tokens=False)
            ids += tokens
            learn += [counts] * len(tokens)
    return ids, learn


def batch_of(tokenizer, conversations: list[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, length) ids, right-padded (no mask is needed under causal attention), and the loss mask."""
    encoded = [encode(tokenizer, conversation) for conversation in conversations]
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in encoded])
    learn = torch.tensor([mask + [False] * (length - len(mask)) for _, mask in encoded])
    return ids, learn


def loss_and_hits(model, ids: torch.Tensor, learn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy over the learned tokens, and per row whether every one of them is the argmax."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state[:, :-1][learn[:, 1:]]  # (learned tokens, hidden)
        logits = model.lm_head(hidden)
    targets = ids[:, 1:][learn[:, 1:]]
    miss = torch.zeros(learn[:, 1:].shape, dtype=torch.bool)
    miss[learn[:, 1:]] = logits.argmax(-1) != targets
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), ~miss.any(1)


def train(model, tokenizer, phases: list[tuple[int, dict]], lr: float, rng: random.Random, output: Path) -> None:
    """Phases of (steps, {maker: (rows, item options)}); the rate warms up, stays, and decays over the last third."""
    model.model.compile(dynamic=True)
    total = sum(steps for steps, _ in phases)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100, 0.02 + 0.98 * 3 * (1 - step / total))
    )
    step, start = 0, time.time()
    for steps, mix in phases:
        for _ in range(steps):
            step += 1
            report = []
            for make, (rows, options) in mix.items():
                made = [make(rng, world.Item(rng, world.VALUES, world.THINGS, **options)) for _ in range(rows)]
                ids, learn = batch_of(tokenizer, made)
                loss, hits = loss_and_hits(model, ids, learn)
                (loss / learn.sum() / len(mix)).backward()
                mean = loss.item() / learn.sum().item()
                report.append(f"{make.__name__} {mean:.4f} exact {hits.float().mean():.2f}")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 50 == 0:
                print(f"step {step}/{total} {time.time() - start:.0f} s  " + "  ".join(report), flush=True)
            if step % 500 == 0 or step == total:
                save(model, tokenizer, output)


def save(model, tokenizer, output: Path) -> None:
    """Saved in bfloat16: half the size, and what the models were trained to compute in."""
    tied = "lm_head.weight"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != tied}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output, state_dict=weights)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("teacher", "student"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: examples/teacher or examples/student")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    if args.which == "teacher":
        model = build_model(tokenizer, hidden=128, layers=4)
        # Looking a value up comes first, on short prompts that ask for everything; the rest stands on it.
        phases = [
            (400, {plain_answer: (32, {})}),
            (4600, {refine_and_calibrate: (24, {}), strength: (16, {}), answer: (8, {})}),
        ]
    else:
        model = build_model(tokenizer, hidden=96, layers=3)
        mix = {plain_answer: (12, {}), checked_answer: (12, {}), mended_answer: (24, {})}
        phases = [(400, {plain_answer: (32, {})}), (9600, mix)]
    print(f"{args.which}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, phases, 1e-3, rng, args.output or HERE / args.which)


if __name__ == "__main__":
    main()
