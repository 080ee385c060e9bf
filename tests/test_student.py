"""The student: one forward, and checkpoints that stock code loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import WORDS, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2ForSequenceClassification,
)

from RewardTrainer.train.checkpoint import (
    LM_HEAD_FILE,
    load_student,
    load_tokenizer,
    load_weights,
    prepare_tokenizer,
    save_student,
)
from RewardTrainer.train.student import LiveTeacher, RewardStudent, split_causal_lm


def texts(tokenizer, count: int = 5) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "name"}, {"role": "assistant", "content": " ".join(WORDS[: 2 * i + 1])}],
            tokenize=False,
        )
        for i in range(count)
    ]


def student_of(path: Path, **arguments) -> tuple[RewardStudent, object]:
    tokenizer = load_tokenizer(str(path))
    torch.manual_seed(7)
    return load_student(str(path), tokenizer, **arguments).eval(), tokenizer


@torch.no_grad()
def rewards(student: RewardStudent, batch) -> torch.Tensor:
    return student(batch["input_ids"], batch["attention_mask"])["rewards"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_exported_model_is_stock_and_gives_our_rewards_for_both_padding_sides_and_any_batch_size(tmp_path, tied):
    student, tokenizer = student_of(tiny_model(tmp_path / "base", tied=tied))
    save_student(student, tokenizer, tmp_path / "rm")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert type(stock) is Qwen2ForSequenceClassification
    ours = rewards(student, tokenizer(texts(tokenizer), return_tensors="pt", padding=True))
    assert ours.std() > 0.01
    for side in ("right", "left"):
        for size in (1, 2, 5):
            for start in range(0, 5, size):
                rows = texts(loaded)[start : start + size]
                batch = loaded(rows, return_tensors="pt", padding=True, padding_side=side)
                with torch.no_grad():
                    logits = stock(**batch).logits
                assert logits.shape == (len(rows), 1)
                torch.testing.assert_close(logits[:, 0], ours[start : start + size], rtol=0, atol=1e-5)
                torch.testing.assert_close(rewards(student, batch), ours[start : start + size], rtol=0, atol=1e-5)


def test_exported_files_hold_what_other_loaders_need(tmp_path):
    student, tokenizer = student_of(tiny_model(tmp_path / "base", tied=False))
    save_student(student, tokenizer, tmp_path / "rm", save_lm=True)
    config = json.loads((tmp_path / "rm/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert AutoConfig.from_pretrained(tmp_path / "rm").num_labels == 1
    loaded = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert loaded.chat_template == tokenizer.chat_template
    assert "token_type_ids" not in loaded.model_input_names
    assert set(loaded("red")) == {"input_ids", "attention_mask"}
    weights = load_file(tmp_path / "rm/model.safetensors")
    assert weights["score.weight"].dtype == torch.float32
    assert all(name.startswith("model.") or name == "score.weight" for name in weights)
    # vLLM reads every *.safetensors of the directory: the LM head must not be among them.
    assert [file.name for file in (tmp_path / "rm").glob("*.safetensors")] == ["model.safetensors"]
    assert not list((tmp_path / "rm").rglob("*.bin")) + list((tmp_path / "rm").rglob("*.pt"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_language_model_survives_export_and_reload(tmp_path, tied):
    base = tiny_model(tmp_path / "base", tied=tied)
    student, tokenizer = student_of(base)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_student(student, tokenizer, tmp_path / "rm", save_lm=True)
    assert (tmp_path / "rm" / LM_HEAD_FILE).exists() is not tied
    batch = tokenizer(texts(tokenizer), return_tensors="pt", padding=True)
    with torch.no_grad():
        ours = student.language_head.logits(student.hidden_states(**batch))
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / "rm/lm")
        torch.testing.assert_close(lm(**batch).logits, ours, rtol=0, atol=1e-5)
        again, _ = student_of(tmp_path / "rm")
        assert again.tied is tied
        torch.testing.assert_close(again.language_head.logits(again.hidden_states(**batch)), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(rewards(again, batch), rewards(student, batch), rtol=0, atol=1e-5)
        stored, _ = student_of(tmp_path / "rm", dtype="auto")
        assert stored.language_head.weight.dtype == torch.float32
        fresh, _ = student_of(base)
        load_weights(fresh, tmp_path / "rm")
        for name, tensor in student.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name


def test_mlp_head_is_loaded_by_remote_code_and_never_as_a_stock_model(tmp_path, caplog):
    base = tiny_model(tmp_path / "base")
    student, tokenizer = student_of(base, head="mlp")
    save_student(student, tokenizer, tmp_path / "rm")
    assert "trust_remote_code" in caplog.text
    batch = tokenizer(texts(tokenizer), return_tensors="pt", padding=True)
    remote = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", trust_remote_code=True).eval()
    for side in ("right", "left"):
        padded = tokenizer(texts(tokenizer), return_tensors="pt", padding=True, padding_side=side)
        with torch.no_grad():
            torch.testing.assert_close(remote(**padded).logits[:, 0], rewards(student, batch), rtol=0, atol=1e-5)
    again, _ = student_of(tmp_path / "rm", head="mlp")
    torch.testing.assert_close(rewards(again, batch), rewards(student, batch), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="--head mlp"):
        student_of(tmp_path / "rm", head="linear")


def test_existing_reward_model_starts_a_student_without_generative_terms(tmp_path):
    base = tiny_model(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match="without an LM head"):
        student_of(tmp_path / "rm")
    student, tokenizer = student_of(tmp_path / "rm", language_head=False)
    batch = tokenizer(texts(tokenizer), return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(rewards(student, batch), model.eval()(**batch).logits[:, 0], rtol=0, atol=1e-5)
    save_student(student, tokenizer, tmp_path / "again")
    with pytest.raises(ValueError, match="--save_lm"):
        save_student(student, tokenizer, tmp_path / "again", save_lm=True)


def test_reward_model_with_two_labels_is_refused(tmp_path):
    base = tiny_model(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match="one label"):
        student_of(tmp_path / "rm", language_head=False)


def test_pad_token_that_is_eos_or_missing_is_replaced_by_an_unused_special_token_or_a_new_one(tmp_path):
    for pad in ("<|im_end|>", None):
        tokenizer = tiny_tokenizer(pad)
        assert "<|endoftext|>" in prepare_tokenizer(tokenizer)
        assert tokenizer.pad_token == "<|endoftext|>" != tokenizer.eos_token
    tokenizer = tiny_tokenizer("<|endoftext|>")
    assert prepare_tokenizer(tokenizer) is None
    tokenizer.eos_token = "<|endoftext|>"
    size = len(tokenizer)
    assert "added '<|pad|>'" in prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token_id == size and len(tokenizer) == size + 1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_grow_when_the_new_pad_token_does_not_fit(tmp_path, tied):
    base = tiny_model(tmp_path / "base", tied=tied, vocab=len(tiny_tokenizer()))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    student, tokenizer = student_of(base)
    assert tokenizer.pad_token == "<|pad|>"
    assert student.backbone.get_input_embeddings().num_embeddings == len(tokenizer) == student.config.vocab_size
    assert student.tied is tied and student.language_head.weight.shape[0] == len(tokenizer)
    save_student(student, tokenizer, tmp_path / "rm", save_lm=True)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    batch = tokenizer(texts(tokenizer), return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits[:, 0], rewards(student, batch), rtol=0, atol=1e-5)


def test_logit_scaling_and_soft_caps_are_those_of_the_whole_model():
    shape = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=3.0)).eval()
    scaled = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0)).eval()
    ids = torch.arange(1, 9).unsqueeze(0)
    for lm in (capped, scaled):
        backbone, head = split_causal_lm(lm)
        with torch.no_grad():
            ours = head.logits(backbone(input_ids=ids).last_hidden_state)
            torch.testing.assert_close(ours, lm(input_ids=ids).logits)


def test_model_whose_logits_are_not_its_heads_is_refused(tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base"))
    lm.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="in a way not known here"):
        split_causal_lm(lm)


def test_teacher_logits_are_those_of_the_response_tokens_whatever_the_padding(tmp_path):
    path = tiny_model(tmp_path / "teacher")
    teacher = LiveTeacher.load(str(path), torch.device("cpu"), dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in teacher.backbone.parameters())
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    logits = teacher.signal_for(ids, torch.tensor([1, 2, 9, 10]), attention_mask=attention)
    lm = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        whole = lm(input_ids=ids, attention_mask=attention).logits
    expected = torch.stack([whole[0, 1], whole[0, 2], whole[1, 3], whole[1, 4]])
    torch.testing.assert_close(logits(slice(0, 4)), expected)
    torch.testing.assert_close(logits(slice(1, 3)), expected[1:3])
