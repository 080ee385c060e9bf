"""LoRA as a user runs it: what is trained, what is written, and that going on from it is exact."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from test_train_launch import flags, launch, logged
from train_fixtures import pair_rows, tiny_model, tiny_tokenizer, write_rows
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from distiller.records import InputError
from RewardTrainer.train import run_reward_train
from RewardTrainer.train.checkpoint import load_student, load_tokenizer, load_weights, save_student
from RewardTrainer.train.lora import add_adapters
from RewardTrainer.train.modeling_mlp_reward import MLPRewardForSequenceClassification

LORA = ("--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "student", tied=request.param)
    tiny_model(root / "teacher", hidden=48, seed=1)
    write_rows(root / "scored.jsonl", pair_rows(60))
    return root


@pytest.fixture(scope="module")
def trained(world) -> Path:
    run_reward_train.main([*flags(world, world / "out", 2), *LORA, "--save_lm", "true"])
    return world / "out"


def rewards(model) -> torch.Tensor:
    tokenizer = tiny_tokenizer()
    batch = tokenizer([row["chosen"] for row in pair_rows(6)], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


def assert_differs_by_the_adapter_alone(merged, adapted) -> None:
    assert "lora" not in " ".join(merged.state_dict())
    torch.testing.assert_close(rewards(merged), rewards(adapted), rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert (rewards(merged) - rewards(adapted)).abs().max() > 1e-3


def test_exported_model_is_stock_and_equals_the_base_with_its_adapter(trained):
    merged = AutoModelForSequenceClassification.from_pretrained(trained)
    # peft finds the base by the adapter's own word.
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(trained / "adapter", num_labels=1)
    assert_differs_by_the_adapter_alone(merged, adapted)


@pytest.mark.parametrize(("family", "head"), [("qwen2", "mlp"), ("gpt2", "linear"), ("gpt2", "mlp")])
def test_export_of_other_heads_and_of_transposed_layers_equals_the_base_with_its_adapter(
    world, tmp_path, family, head
):
    student = tiny_model(tmp_path / "student", family=family)
    given = [*flags(world, tmp_path / "out", 2), *LORA, "--head", head, "--max_steps", "4"]
    run_reward_train.main([*given, "--model_name_or_path", str(student), "--layout", "padded"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=head == "mlp")
    if head == "linear":
        base = AutoModelForSequenceClassification.from_pretrained(student, num_labels=1)
    else:
        config = AutoConfig.from_pretrained(student, num_labels=1)
        config.reward_head_width = 1024
        base = MLPRewardForSequenceClassification(config)
        base.model = AutoModel.from_pretrained(student)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out/adapter")
    assert_differs_by_the_adapter_alone(merged, adapted)


def test_only_adapted_layers_and_the_reward_head_differ_from_the_base(world, trained):
    base = AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    after = AutoModelForCausalLM.from_pretrained(trained / "lm").state_dict()
    assert base.keys() == after.keys()
    for name, tensor in base.items():
        adapted = name.endswith(".weight") and name.split(".")[-2] in LAYERS
        assert torch.equal(tensor, after[name]) is not adapted, name


def test_adapter_says_what_was_asked_for(world, tmp_path):
    given = ["--use_peft", "--lora_r", "3", "--lora_alpha", "12", "--lora_dropout", "0.25"]
    given += ["--lora_target_modules", "q_proj", "up_proj"]
    run_reward_train.main([*flags(world, tmp_path / "out", 2), "--max_steps", "1", *given])
    said = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (3, 12, 0.25)
    assert set(said["target_modules"]) == {"q_proj", "up_proj"} and said["modules_to_save"] == ["score"]
    tensors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in tensors if ".lora_" in name}
    assert adapted == {"q_proj", "up_proj"}
    assert {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A" in name} == {3}
    assert "| `lora_r` | 3 |" in (tmp_path / "out/README.md").read_text()


def test_checkpoint_holds_adapters_and_reward_head_alone_and_all_of_them_are_trained(trained):
    checkpoints = sorted(trained.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    first, last = (load_file(path / "adapter_model.safetensors") for path in (checkpoints[0], checkpoints[-1]))
    assert first.keys() == last.keys() and any(name.endswith("score.weight") for name in first)
    for name in first:
        assert ".lora_" in name or name.endswith("score.weight"), name
        assert not torch.equal(first[name], last[name]), name
    assert not list(trained.glob("checkpoint-*/model*.safetensors"))


def test_run_stopped_and_resumed_ends_as_the_uninterrupted_one(world, trained):
    output = world / "resumed"
    output.mkdir()
    first = min(trained.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    arguments = [*flags(world, output, 2), *LORA]
    run_reward_train.main([*arguments, "--resume_from_checkpoint", str(first)])
    resumed, whole = load_file(output / "model.safetensors"), load_file(trained / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(world, trained):
    output = world / "checkpointing"
    run_reward_train.main([*flags(world, output, 2), *LORA, "--gradient_checkpointing", "true"])
    one, other = load_file(output / "model.safetensors"), load_file(trained / "model.safetensors")
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)


def test_flags_without_use_peft_and_unknown_layers_are_refused(world, tmp_path):
    with pytest.raises(InputError, match="goes with --use_peft"):
        run_reward_train.main([*flags(world, tmp_path, 2), "--lora_r", "4"])
    for layer in ("nothing", "embed_tokens"):
        with pytest.raises(InputError, match="--lora_target_modules"):
            run_reward_train.main([*flags(world, tmp_path, 2), *LORA, "--lora_target_modules", layer])


def test_adapters_of_a_bf16_base_are_fp32_and_no_model_without_them_is_taken_for_their_checkpoint(world, tmp_path):
    tokenizer = load_tokenizer(str(world / "student"))
    student = load_student(str(world / "student"), tokenizer, dtype=torch.bfloat16)
    save_student(student, tokenizer, tmp_path)
    add_adapters(student, r=4, alpha=8, dropout=0.0)
    trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in student.parameters() if not parameter.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    with pytest.raises(InputError, match="not a checkpoint of a run with --use_peft"):
        load_weights(student, tmp_path)


@pytest.mark.slow
def test_two_ranks_under_zero3_end_as_one_process_and_resume_on_the_same_curve(world, trained):
    whole, resumed = world / "zero3", world / "zero3-resumed"
    launch(world, whole, *LORA, zero=3)
    first = min(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    launch(world, resumed, *LORA, "--resume_from_checkpoint", str(first), zero=3)
    both, again, alone = (load_file(path / "model.safetensors") for path in (whole, resumed, trained))
    assert both.keys() == again.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], rtol=0, atol=1e-3)
        torch.testing.assert_close(again[name], both[name], rtol=0, atol=1e-5)
    step = int(first.name.split("-")[1])
    curve = [log["loss"] for log in logged(whole)]
    assert [log["loss"] for log in logged(resumed)] == pytest.approx(curve, abs=1e-5) and step < len(curve)
