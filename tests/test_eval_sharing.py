"""Responses that share a prompt get the rewards they get alone, and the prompt is computed once."""

import random

import numpy as np
import pytest
import torch
from eval_fixtures import CHATML_WITH_BOS, ENDS_IN_END_TOKEN, build_model, build_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen3Config,
)

from RewardTrainer.eval.engines.hf import Scorer
from RewardTrainer.packing import common_prefix
from RewardTrainer.train.modeling_mlp_reward import MLPRewardForSequenceClassification

WORDS = ["tin", "red", "boat", "the", "metal", "# Notes", "\n", "名前", "é"]


def rows(count: int = 8, most: int = 5) -> list[list[list[dict]]]:
    """Rows of 1 to `most` responses to one prompt; some of a row are equal, or begin alike."""
    draw = random.Random(1)
    result = []
    for number in range(count):
        prompt = {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))}
        answers = [" ".join(draw.choices(WORDS, k=draw.randint(1, 25))) for _ in range(1 + number % most)]
        answers += [answers[0], answers[0] + " more"] if number % 3 == 0 else []
        result.append([[prompt, {"role": "assistant", "content": answer}] for answer in answers])
    return result


@torch.no_grad()
def alone(model, tokenizer, chats: list[list[list[dict]]]) -> list[list[float]]:
    """The oracle: every conversation by itself, through the model's own forward."""
    return [
        [
            model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits.item()
            for chat in row
        ]
        for row in chats
    ]


def together(scorer: Scorer, chats: list[list[list[dict]]]) -> list[list[float]]:
    rewards = [[None] * len(row) for row in chats]
    for row, number, reward in scorer.score(scorer.encode(chats)):
        assert rewards[row][number] is None
        rewards[row][number] = reward
    return rewards


def approx(expected: list[list[float]]) -> list:
    return [pytest.approx(row, abs=1e-5) for row in expected]


def seeded(model_class: type, config) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


def sizes(tokenizer) -> dict:
    return {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.3}


def gpt2(tokenizer):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    return seeded(GPT2ForSequenceClassification, GPT2Config(**sizes(tokenizer), **shape))


def small(tokenizer) -> dict:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {**sizes(tokenizer), **shape}


def mistral_with_window(tokenizer):
    config = MistralConfig(**small(tokenizer), num_key_value_heads=1, sliding_window=8)
    return seeded(MistralForSequenceClassification, config)


def gpt_neo(tokenizer):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPTNeoConfig(**sizes(tokenizer), **shape, **ends, window_size=64, max_position_embeddings=512)
    return seeded(GPTNeoForSequenceClassification, config)


def bert(tokenizer):
    return seeded(BertForSequenceClassification, BertConfig(**small(tokenizer)))


def mlp_head(tokenizer):
    config = Qwen3Config(**small(tokenizer), num_key_value_heads=1, head_dim=16)
    config.reward_head_width = 16
    return seeded(MLPRewardForSequenceClassification, config)


@pytest.mark.parametrize("tokens_per_batch", [1, 250, 100_000])
def test_rewards_of_a_shared_prompt_are_those_of_each_conversation_alone(tokens_per_batch, kernel):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    scorer = Scorer(model, tokenizer, tokens_per_batch=tokens_per_batch)
    assert scorer.shares_prompts
    expected = alone(model, tokenizer, rows())
    assert max(map(max, expected)) - min(map(min, expected)) > 0.5
    assert together(scorer, rows()) == approx(expected)


@pytest.mark.parametrize("pad_token_id", [None, 2])
@pytest.mark.parametrize("template", [CHATML_WITH_BOS, ENDS_IN_END_TOKEN])
def test_sharing_pools_as_transformers_does_without_a_pad_token_and_with_eos_as_pad(template, pad_token_id):
    tokenizer = build_tokenizer(template)
    model = build_model(tokenizer, pad_token_id=pad_token_id)
    scorer = Scorer(model, tokenizer)
    assert scorer.shares_prompts
    assert together(scorer, rows()) == approx(alone(model, tokenizer, rows()))


@pytest.mark.parametrize(
    ("build", "shares"),
    [(gpt2, True), (mlp_head, True), (mistral_with_window, True), (gpt_neo, False), (bert, False)],
)
def test_models_that_cannot_share_are_found_out_and_scored_right_all_the_same(build, shares):
    tokenizer = build_tokenizer()
    model = build(tokenizer)
    scorer = Scorer(model, tokenizer)
    assert scorer.shares_prompts is shares
    assert together(scorer, rows()) == approx(alone(model, tokenizer, rows()))


def test_eager_attention_is_scored_right_on_padded_rows():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.set_attn_implementation("eager")
    scorer = Scorer(model, tokenizer)
    assert "--attn_implementation eager cannot" in scorer.layout
    assert together(scorer, rows()) == approx(alone(model, tokenizer, rows()))


@pytest.mark.parametrize("tokens_per_batch", [1, 250, 100_000])
def test_rewards_without_sharing_are_the_same(tokens_per_batch):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    scorer = Scorer(model, tokenizer, tokens_per_batch=tokens_per_batch, share_prompts=False)
    assert scorer.layout.startswith("no padding, ")
    assert together(scorer, rows()) == approx(alone(model, tokenizer, rows()))


def test_conversations_cut_at_different_places_share_what_is_left_in_common():
    tokenizer = build_tokenizer(CHATML_WITH_BOS)
    model = build_model(tokenizer)
    scorer = Scorer(model, tokenizer, max_length=40)
    encoded = scorer.encode(rows())
    assert any(part.truncated for row in encoded for part in row)
    with torch.no_grad():
        expected = [[model(input_ids=torch.tensor([part.ids])).logits.item() for part in row] for row in encoded]
    assert together(scorer, rows()) == approx(expected)


def test_a_prompt_of_all_its_responses_is_computed_once():
    tokenizer = build_tokenizer()
    scorer = Scorer(build_model(tokenizer), tokenizer)
    prompt = {"role": "user", "content": "boat " * 60}
    answers = ["tin", "red boat", "the metal", "é"]
    encoded = scorer.encode([[[prompt, {"role": "assistant", "content": answer}] for answer in answers]])
    (unit,) = scorer.plan(encoded)
    shared = common_prefix([np.array(part.ids) for part in encoded[0]])
    assert shared > 60
    assert unit.length == sum(part.size for part in encoded[0]) - 3 * shared


def test_a_row_over_the_budget_is_run_in_parts_that_share_its_prompt_each():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    prompt = {"role": "user", "content": "boat " * 60}
    chats = [[[prompt, {"role": "assistant", "content": answer}] for answer in ("tin", "red boat", "the metal", "é")]]
    expected = alone(model, tokenizer, chats)
    lengths = []
    for budget in (10_000, 90, 1):
        scorer = Scorer(model, tokenizer, tokens_per_batch=budget)
        encoded = scorer.encode(chats)
        units = scorer.plan(encoded)
        assert [number for unit in units for number in unit.numbers] == [0, 1, 2, 3]
        assert all(unit.length <= budget or len(unit.numbers) == 1 for unit in units)
        lengths.append(len(units))
        assert together(scorer, chats) == approx(expected)
    assert lengths[0] == 1 and lengths[2] == 4


def test_equal_conversations_of_a_row_are_run_once_and_get_one_reward():
    tokenizer = build_tokenizer()
    scorer = Scorer(build_model(tokenizer), tokenizer)
    prompt = {"role": "user", "content": "boat"}
    answers = ["red tin"] * 3 + ["red tin and more", "red tin"]
    chats = [[[prompt, {"role": "assistant", "content": answer}] for answer in answers] for _ in range(5)]
    for row in together(scorer, chats):
        assert len(set(row)) == 2
