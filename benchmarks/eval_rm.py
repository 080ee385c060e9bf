"""How much faster `eval_rm.sh` scores pairs than the plain pipeline does, against what token counts alone allow.

    python benchmarks/eval_rm.py                                # pairs of the embedded world
    python benchmarks/eval_rm.py --pairs my_pairs.jsonl --rows 400 --shape 3b --dtype bfloat16     # on a GPU; also MFU

The plain pipeline takes the pairs in file order (shuffled here, with a seed), in batches of 8 padded to their longest
row, chosen and rejected in separate calls. Against it stand the engine without and with sharing of prompts, on the
file's own prompts and on prompts made as long as the answers. The bound is the plain pipeline's tokens, padding
included, over the tokens there are (`grouped`) or over those with each pair's prompt counted once (`shared`). The
model has random weights; the tokenizer is trained on the file. Rewards of all three must agree.

Each of `--repeats` rounds takes other pairs of the file, as an evaluation does: what is made anew for lengths that
were not seen before must count. Ratios are those within a round, of which the median is taken. A round of other pairs
yet warms up. Times are processor time on a CPU, where other work on the machine would count otherwise, and wall time
on a GPU. There it also prints rows a second and MFU: two operations a weight and token, what a pair shares counted
once, and attention. Prints a table, and a last line with it as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from distiller.records import InputError, prompt_messages, read_rows, response_text
from RewardTrainer.eval.engines.hf import Scorer, run_head_in_fp32
from RewardTrainer.eval.engines.loading import DTYPES
from RewardTrainer.fused_layers import use_fused_layers
from RewardTrainer.packing import no_plans_by_shape, packed_length, prefix_tree
from RewardTrainer.packing_trial import distance
from RewardTrainer.train.speed import model_cost, peak_flops

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
PLAIN_BATCH = 8
PAIRS = str(Path(__file__).resolve().parents[1] / "examples" / "data" / "pairs.jsonl")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template, about as many characters a token as a real one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def build_model(vocabulary: int, args: argparse.Namespace) -> Qwen2ForSequenceClassification:
    """Qwen2 of random weights in its usual proportions."""
    shape = {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": max(1, args.hidden // 256),
    }
    if args.shape == "3b":
        shape = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36}
        shape |= {"num_attention_heads": 16, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        **shape,
    )
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = Qwen2ForSequenceClassification(config).to(DTYPES[args.dtype])
    no_plans_by_shape()
    run_head_in_fp32(model)
    return model.eval()


def conversations(rows: list[dict], lengthen: Callable[[int], str] | None) -> list[list[list[dict]]]:
    """[chosen, rejected] conversation of each row; `lengthen` gives the text to put before a row's prompt."""
    pairs = []
    for index, row in enumerate(rows):
        prompt = prompt_messages(row["prompt"])
        if lengthen:
            prompt[-1] = {"role": "user", "content": lengthen(index) + prompt[-1]["content"]}
        answers = (response_text(row[name]) for name in ("chosen", "rejected"))
        pairs.append([[*prompt, {"role": "assistant", "content": answer}] for answer in answers])
    return pairs


@torch.inference_mode()
def plain(model: Qwen2ForSequenceClassification, columns: list[list[tuple[int, ...]]]) -> list[list[float]]:
    """Rewards of the chosen, then of the rejected, in batches of 8 in file order."""
    rewards: list[list[float]] = []
    for column in columns:
        rewards.append([])
        for start in range(0, len(column), PLAIN_BATCH):
            batch = column[start : start + PLAIN_BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
            logits = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).logits
            rewards[-1] += logits[:, 0].double().tolist()
    return rewards


def seconds(work: Callable[[], object]) -> float:
    """Processor time of all threads on a CPU, wall time on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(model, tokenizer, rounds: list[list[list[list[dict]]]], args: argparse.Namespace) -> dict[str, float]:
    """Bounds, ratios and the share of its bound that each reaches, over rounds of pairs; the first one warms up."""
    scorers = {
        name: Scorer(model, tokenizer, tokens_per_batch=args.tokens_per_batch, share_prompts=name == "shared")
        for name in ("grouped", "shared")
    }
    cost = model_cost(model.base_model, None)
    peak = peak_flops(model.device, args.dtype != "float32")
    ratios: list[dict[str, float]] = []
    totals = dict.fromkeys(("plain", "grouped", "shared"), 0.0)
    flops = pairs_run = 0
    for pairs in rounds:
        encoded = scorers["shared"].encode(pairs)
        columns = [[row[side].ids for row in encoded] for side in (0, 1)]
        starts = range(0, len(pairs), PLAIN_BATCH)
        batches = [column[start : start + PLAIN_BATCH] for column in columns for start in starts]
        padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
        tokens = sum(len(ids) for column in columns for ids in column)
        packed = sum(packed_length([np.array(part.ids) for part in row], share=True) for row in encoded)

        rewards: dict[str, list] = {}

        def run(name: str, encoded=encoded, columns=columns, rewards=rewards) -> None:
            if name == "plain":
                rewards[name] = plain(model, columns)
            else:
                rewards[name] = [[0.0] * len(encoded), [0.0] * len(encoded)]
                for row, side, reward in scorers[name].score(encoded):
                    rewards[name][side][row] = reward

        times = {name: seconds(partial(run, name)) for name in totals}
        for name in scorers:
            apart = distance(*(torch.tensor(rewards[key]) for key in (name, "plain")))
            if apart > (1e-3 if args.dtype == "float32" else 0.1):  # random layers in bf16: 0.05
                sys.exit(f"{name}: rewards are {apart:.2g} off those of the plain pipeline, relative RMS")
        if pairs is rounds[0]:
            continue
        ratio = {"grouped_bound": padded / tokens, "shared_bound": padded / packed}
        for name in scorers:
            ratio[name] = times["plain"] / times[name]
            ratio[f"{name}_reach"] = ratio[name] / ratio[f"{name}_bound"]
        ratios.append(ratio)
        totals = {name: totals[name] + times[name] for name in totals}
        pairs_run += len(pairs)
        for row in encoded:
            tree = prefix_tree([np.array(part.ids) for part in row])[0]
            flops += cost.flops([(piece.start, piece.stop) for piece in tree], 0, trained=False)
    print(f"  {len(ratios)} rounds of {len(rounds[0])} pairs; the last: {tokens} tokens, {packed} of them new,")
    print(f"  {padded} in the plain pipeline. " + ", ".join(f"{name} {value:.1f} s" for name, value in totals.items()))
    result = {name: statistics.median(ratio[name] for ratio in ratios) for name in ratios[0]}
    if torch.cuda.is_available():
        for name, total in totals.items():
            result[f"{name}_rows_per_second"] = 2 * pairs_run / total
            if peak is not None:
                result[f"{name}_mfu"] = flops / total / peak
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=PAIRS, help="JSONL file with prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=160, help="pairs of a round")
    parser.add_argument("--hidden", type=int, default=768, help="the model's width")
    parser.add_argument("--layers", type=int, default=3, help="and depth")
    parser.add_argument("--shape", choices=["3b"], help="Qwen2.5-3B's, in place of --hidden and --layers")
    parser.add_argument("--dtype", default="float32", choices=[*DTYPES], help="precision")
    parser.add_argument("--tokens_per_batch", type=int, help="as in eval_rm.sh")
    parser.add_argument("--repeats", type=int, default=2, help="rounds, each of other pairs, after one that warms up")
    args = parser.parse_args()

    try:
        rows = list(read_rows(args.pairs, required={"prompt": "", "chosen": "", "rejected": ""}, strict=True))
    except InputError as fault:
        sys.exit(f"error: {fault}")
    need = args.rows * (args.repeats + 1)
    if len(rows) < need:
        sys.exit(f"error: {args.pairs} has {len(rows)} pairs, {need} are needed: smaller --rows or --repeats")
    random.Random(0).shuffle(rows)
    tokenizer = build_tokenizer([response_text(row[name]) for row in rows for name in ("chosen", "rejected")])
    model = build_model(len(tokenizer), args)
    print(f"layers: {use_fused_layers(model.base_model, model.device)}")

    def as_long_as_the_answers(index: int) -> str:
        mean = sum(len(response_text(rows[index][name])) for name in ("chosen", "rejected")) // 2
        text = " ".join(response_text(rows[(index + n) % len(rows)]["chosen"]) for n in (1, 2, 3, 4, 5))
        return text[: max(0, mean - len(prompt_messages(rows[index]["prompt"])[-1]["content"]))]

    ratios = {}
    for name, lengthen in (("file", None), ("long_prompts", as_long_as_the_answers)):
        print(f"{name}:")
        pairs = conversations(rows[:need], lengthen)
        rounds = [pairs[start : start + args.rows] for start in range(0, need, args.rows)]
        result = measure(model, tokenizer, rounds, args)
        for kind in ("grouped", "shared"):
            times, bound, reach = (result[f"{kind}{suffix}"] for suffix in ("", "_bound", "_reach"))
            print(f"  {kind:8} {times:.2f} times as fast, bound {bound:.2f}, reached {reach:.0%}")
        for kind in ("plain", "grouped", "shared"):
            if f"{kind}_rows_per_second" in result:
                mfu = result.get(f"{kind}_mfu")
                known = "" if mfu is None else f", MFU {mfu:.1%}"
                print(f"  {kind:8} {result[f'{kind}_rows_per_second']:.0f} rows/s{known}")
        ratios |= {f"{name}_{key}": round(value, 3) for key, value in result.items()}
    print(json.dumps({"benchmark": "eval_rm", "ratios": ratios}))


if __name__ == "__main__":
    main()
