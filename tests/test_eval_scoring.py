"""Rewards against plain transformers, one conversation at a time, and what is refused instead of scored."""

import json
import os
import random
import shutil

import pytest
import torch
from eval_fixtures import (
    CHATML,
    CHATML_WITH_BOS,
    ENDS_IN_END_TOKEN,
    build_model,
    build_tokenizer,
    save_reward_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distiller.records import InputError
from RewardTrainer.eval.engines.encoding import longest_input
from RewardTrainer.eval.engines.hf import Scorer, choose_pad_id, load_scorer, plan_batches

WORDS = ["tin", "red", "boat", "the", "metal", "# Notes", "\n", "名前", "\x00", "é"]


def conversations(count: int = 24) -> list[list[dict]]:
    draw = random.Random(0)
    return [
        [
            {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))},
            {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))},
        ]
        for _ in range(count)
    ]


def rewards(scorer: Scorer, chats: list[list[dict]]) -> list[float]:
    """Each conversation a row of its own."""
    given = {row: reward for row, _, reward in scorer.score(scorer.encode([[chat] for chat in chats]))}
    return [given[row] for row in range(len(chats))]


@torch.no_grad()
def one_by_one(model, tokenizer, chats: list[list[dict]]) -> list[float]:
    """The oracle: transformers' own tokenization of a chat, a batch of one, no padding."""
    batches = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]
    return [model(**batch).logits.item() for batch in batches]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("eval") / "reward_model")


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rewards_do_not_depend_on_batch_size_or_padding_side(model_dir, tokens_per_batch, padding_side):
    model = AutoModelForSequenceClassification.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side=padding_side)
    expected = one_by_one(model, tokenizer, conversations())
    assert max(expected) - min(expected) > 0.5  # or agreement would mean nothing
    scorer = Scorer(model, tokenizer, tokens_per_batch=tokens_per_batch)
    assert rewards(scorer, conversations()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("template", [CHATML, ENDS_IN_END_TOKEN])
def test_a_model_without_pad_token_is_scored_in_batches_as_it_is_alone(template):
    tokenizer = build_tokenizer(template)
    model = build_model(tokenizer, pad_token_id=None)
    expected = one_by_one(model, tokenizer, conversations())
    assert rewards(Scorer(model, tokenizer), conversations()) == pytest.approx(expected, abs=1e-5)
    assert model.config.pad_token_id is None


def test_a_bidirectional_encoder_is_scored_in_batches_as_it_is_alone():
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    expected = one_by_one(model, tokenizer, conversations())
    assert rewards(Scorer(model, tokenizer), conversations()) == pytest.approx(expected, abs=1e-5)


def test_a_model_whose_pad_token_ends_every_conversation_is_scored_as_transformers_does_and_says_so(capsys):
    tokenizer = build_tokenizer(ENDS_IN_END_TOKEN)
    model = build_model(tokenizer, pad_token_id=tokenizer.eos_token_id)
    expected = one_by_one(model, tokenizer, conversations())
    assert rewards(Scorer(model, tokenizer), conversations()) == pytest.approx(expected, abs=1e-5)
    assert "24 of 24 conversations end in the model's pad token" in capsys.readouterr().err


def test_exactly_one_bos_where_both_template_and_tokenizer_write_one():
    tokenizer = build_tokenizer(CHATML_WITH_BOS)
    assert tokenizer("tin")["input_ids"][0] == tokenizer.bos_token_id  # left to itself the tokenizer would add another
    scorer = Scorer(build_model(tokenizer), tokenizer)
    (chat,) = conversations(1)
    ((row,),) = scorer.encode([[chat]])
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert row.ids[0] == tokenizer.bos_token_id
    assert list(row.ids) == tokenizer.apply_chat_template(chat)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS])
def test_truncation_takes_the_left_end_is_counted_and_spares_bos_and_the_end_of_the_response(template):
    tokenizer = build_tokenizer(template)
    scorer = Scorer(build_model(tokenizer), tokenizer, max_length=40)
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in [("q", "tin"), ("q" * 60, "tin"), ("q", "z" * 60 + "tin")]
    ]
    whole = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in chats]
    encoded = [row for (row,) in scorer.encode([[chat] for chat in chats])]
    assert [(row.truncated, row.response_cut) for row in encoded] == [(False, False), (True, False), (True, True)]
    assert list(encoded[0].ids) == whole[0]
    bos = [tokenizer.bos_token_id] if template == CHATML_WITH_BOS else []
    for row, ids in zip(encoded[1:], whole[1:], strict=True):
        assert list(row.ids) == bos + ids[len(bos) - 40 :]
    # The cut is seen from the response's first token on, whatever the template writes behind it.
    before = len(tokenizer.apply_chat_template(chats[1][:1], add_generation_prompt=True)["input_ids"])
    for room, cut in ((0, False), (1, True)):
        scorer.max_length = len(whole[1]) - before + len(bos) - room
        assert scorer.encode([[chats[1]]])[0][0].response_cut is cut


@pytest.mark.parametrize("pad", [-1, 10_000])
def test_a_pad_token_that_the_embeddings_lack_changes_no_reward(model_dir, pad):
    expected = rewards(load_scorer(str(model_dir)), conversations())
    scorer = load_scorer(str(model_dir))
    scorer.model.config.pad_token_id = pad
    assert rewards(scorer, conversations()) == pytest.approx(expected, abs=1e-5)


def test_a_response_of_50000_characters_is_scored_within_the_limit_of_the_model(model_dir):
    scorer = load_scorer(str(model_dir))
    assert scorer.max_length == 512
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "tin \x00" * 10_000}]
    ((row,),) = scorer.encode([[chat]])
    assert (len(row.ids), row.truncated, row.response_cut) == (512, True, True)
    assert len(list(scorer.score([[row]]))) == 1


def test_batches_hold_similar_lengths_within_the_token_budget():
    lengths = [3, 50, 4, 49, 5, 200, 3]
    batches = plan_batches(lengths, 100, padded=True)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches[:2] == [[5], [1, 3]]  # longer than the budget: alone
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)
    assert plan_batches([], 100, padded=True) == []


def test_the_chosen_pad_id_ends_no_row():
    assert choose_pad_id([[5, 0], [5, 1], [2, 3], [3, 0]]) == 2


def test_a_saved_model_is_loaded_in_fp32_on_cpu_and_agrees_with_transformers(model_dir):
    scorer = load_scorer(str(model_dir))
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32)
    assert scorer.model.dtype == torch.float32 or torch.cuda.is_available()
    expected = one_by_one(model, AutoTokenizer.from_pretrained(model_dir), conversations())
    tolerance = 1e-5 if scorer.model.dtype == torch.float32 else 0.2
    assert rewards(scorer, conversations()) == pytest.approx(expected, abs=tolerance)


def test_bf16_rewards_stay_close_and_are_not_rounded_to_bf16(model_dir):
    exact = rewards(load_scorer(str(model_dir), dtype="float32"), conversations())
    scorer = load_scorer(str(model_dir), dtype="bfloat16")
    assert torch.equal(scorer.model.score.weight, load_file(model_dir / "model.safetensors")["score.weight"])
    assert {parameter.dtype for parameter in scorer.model.base_model.parameters()} == {torch.bfloat16}
    coarse = rewards(scorer, conversations())
    assert coarse == pytest.approx(exact, abs=0.2)
    assert any(value != torch.tensor(value).bfloat16().item() for value in coarse)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def two_labels(directory):
    edit_config(directory, id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1})


def no_head(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def half_a_backbone(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def no_template(directory):
    (directory / "chat_template.jinja").unlink()


def language_model(directory):
    config = AutoModelForSequenceClassification.from_pretrained(directory).config
    config.num_labels = 2  # the default
    Qwen2ForCausalLM(config).save_pretrained(directory)


def no_config(directory):
    (directory / "config.json").unlink()


def adapter_alone(directory):
    (directory / "config.json").rename(directory / "adapter_config.json")


def training_not_ended(directory):
    for step in (5, 10):
        shutil.copytree(directory, directory.parent / f"checkpoint-{step}")
    shutil.rmtree(directory)
    directory.mkdir()
    for checkpoint in directory.parent.glob("checkpoint-*"):
        checkpoint.rename(directory / checkpoint.name)
    os.utime(directory / "checkpoint-5/config.json", ns=(0, 0))


def own_code(directory):
    edit_config(directory, model_type="mystery", auto_map={"AutoConfig": "mystery.Config"})
    (directory / "mystery.py").write_text("raise SystemExit('remote code has run')\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (two_labels, "num_labels is 2"),
        (language_model, "num_labels is 2.*Qwen2ForCausalLM"),
        (no_head, "lacks score.weight; .*random"),
        (half_a_backbone, "lacks model.layers.1.mlp.up_proj.weight"),
        (pickled, "safetensors"),
        (no_template, "no chat template"),
        (no_config, "no config.json; give the directory"),
        (
            training_not_ended,
            "--resume_from_checkpoint last. The newest model in it: --model .*checkpoint-10",
        ),
        (adapter_alone, "merge the LoRA adapter"),
        (own_code, "custom code"),
    ],
)
def test_a_model_that_would_give_wrong_rewards_is_refused(model_dir, tmp_path, harm, words):
    shutil.copytree(model_dir, tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(InputError, match=words):
        load_scorer(str(tmp_path / "model"))


def test_a_directory_that_is_not_there_is_told_how_to_make_one():
    with pytest.raises(InputError, match="no such directory.*train_distilrm"):
        load_scorer("../output/nothing_here")


@pytest.mark.parametrize("max_length", [0, 513])
def test_a_max_length_the_model_cannot_take_is_refused(model_dir, max_length):
    with pytest.raises(InputError, match="takes 1 to 512 tokens"):
        load_scorer(str(model_dir), max_length=max_length)


def test_trust_in_remote_code_is_said_aloud(model_dir, capsys):
    load_scorer(str(model_dir), trust_remote_code=True)
    assert "will run on this machine" in capsys.readouterr().err


def test_rewards_that_are_no_numbers_are_refused():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="2 of 2 rewards are not finite"):
        rewards(Scorer(model, tokenizer), conversations(2))


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<extra>"}]
    with pytest.raises(InputError, match="do not belong together"):
        rewards(Scorer(model, tokenizer), [chat])


def test_a_conversation_the_template_refuses_is_an_input_error():
    tokenizer = build_tokenizer("{{ raise_exception('no system message here') }}")
    with pytest.raises(InputError, match="no system message here"):
        Scorer(build_model(tokenizer), tokenizer).render(conversations(1)[0])


def test_a_models_longest_input_is_known_under_whatever_name_it_stores_it():
    tokenizer = build_tokenizer()
    assert longest_input(GPT2Config(n_positions=64), tokenizer) == 64
    assert longest_input(Qwen2Config(max_position_embeddings=96), tokenizer) == 96
    tokenizer.model_max_length = 32
    assert longest_input(GPT2Config(n_positions=64), tokenizer) == 32
