"""QLoRA: a frozen base in 4 bits. Training is skipped where bitsandbytes is missing, refusals are tested anywhere."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_lora import LORA, assert_differs_by_the_adapter_alone
from test_train_launch import flags, launch, logged
from train_fixtures import pair_rows, tiny_model, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from distiller.records import InputError
from RewardTrainer.train import run_reward_train
from RewardTrainer.train.checkpoint import load_student, load_tokenizer
from RewardTrainer.train.quantization import check_4bit, load_args_4bit

needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes is not installed (pip install bitsandbytes)"
)
CPU = torch.device("cpu")
PAPER = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
# Hidden sizes that are no multiple of bitsandbytes' blocks too.
FAMILIES = {"qwen2": 96, "gpt2": 64}


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "student", hidden=FAMILIES[request.param], family=request.param)
    tiny_model(root / "teacher", hidden=48, seed=1)
    write_rows(root / "scored.jsonl", pair_rows(60))
    return root


def arguments(world: Path, output: Path) -> list[str]:
    own = ["--load_in_4bit", "--layout", "padded", "--eval_ratio", "0.1"]
    return [*flags(world, output, 2), *LORA, *own]


@pytest.fixture(scope="module")
def trained(world) -> Path:
    run_reward_train.main([*arguments(world, world / "out"), "--save_lm", "true"])
    return world / "out"


def test_4_bits_are_refused_where_they_cannot_be_had(world, tmp_path):
    with pytest.raises(InputError, match="goes with --use_peft"):
        run_reward_train.main([*flags(world, tmp_path, 2), "--load_in_4bit"])
    for sharded in ({"zero_stage": 3}, {"fsdp": True}):
        with pytest.raises(InputError, match="ZERO=2"):
            check_4bit(CPU, **sharded)
    if is_bitsandbytes_available():
        check_4bit(CPU, zero_stage=2)
        with pytest.raises(InputError, match="'meta'"):
            check_4bit(torch.device("meta"))
    else:
        with pytest.raises(InputError, match="pip install -U bitsandbytes"):
            run_reward_train.main(arguments(world, tmp_path))


@needs_bitsandbytes
def test_export_is_stock_and_equals_the_dequantized_base_with_its_adapter(world, trained):
    merged = AutoModelForSequenceClassification.from_pretrained(trained)
    base = AutoModelForSequenceClassification.from_pretrained(
        world / "student", num_labels=1, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **PAPER)
    )
    base = base.dequantize()
    for layer in base.modules():
        if isinstance(layer, torch.nn.Linear) and layer.bias is not None:
            layer.bias.data = layer.bias.data.bfloat16().float()  # as bitsandbytes computes with them
    adapted = PeftModel.from_pretrained(base, trained / "adapter")
    assert_differs_by_the_adapter_alone(merged, adapted)
    said = json.loads((trained / "config.json").read_text())
    assert not any("quant" in name for name in said), said
    assert {tensor.dtype for tensor in load_file(trained / "model.safetensors").values()} == {torch.float32}


@needs_bitsandbytes
def test_base_is_rounded_to_4_bits_and_nothing_but_its_linear_layers(world, trained):
    before = AutoModelForCausalLM.from_pretrained(world / "student")
    after = AutoModelForCausalLM.from_pretrained(trained / "lm").state_dict()
    student = load_student(str(world / "student"), load_tokenizer(str(world / "student")), in_4bit_on=CPU)
    held = {name for name, parameter in student.backbone.named_parameters() if parameter.dtype == torch.uint8}
    assert held
    for name, tensor in before.state_dict().items():
        ours = name.removeprefix(before.base_model_prefix + ".")
        if ours.replace(".bias", ".weight") in held - {ours}:
            tensor = tensor.bfloat16().float()
        assert torch.equal(tensor, after[name]) is not (ours in held), name


@needs_bitsandbytes
def test_every_adapter_and_the_head_learn_after_an_evaluation(trained):
    checkpoints = sorted(trained.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    first, last = (load_file(path / "adapter_model.safetensors") for path in (checkpoints[0], checkpoints[-1]))
    for name in first:
        assert not torch.equal(first[name], last[name]), name


@needs_bitsandbytes
def test_run_stopped_and_resumed_ends_as_the_uninterrupted_one(world, trained):
    first = min(trained.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    run_reward_train.main([*arguments(world, world / "resumed"), "--resume_from_checkpoint", str(first)])
    for one, other in zip(logged(world / "resumed"), logged(trained), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    resumed, whole = load_file(world / "resumed/model.safetensors"), load_file(trained / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)


@needs_bitsandbytes
def test_reward_model_goes_on_in_4_bits_and_quantized_weights_are_no_student(world, trained, tmp_path):
    start = ["--model_name_or_path", str(trained), "--max_steps", "2"]
    run_reward_train.main([*arguments(world, tmp_path / "again"), *start])
    before, after = (load_file(path / "model.safetensors") for path in (trained, tmp_path / "again"))
    assert (before["score.weight"] - after["score.weight"]).abs().max() < 0.01
    stored = AutoModelForCausalLM.from_pretrained(world / "student", **load_args_4bit(CPU))
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(InputError, match="quantized weights"):
        load_student(str(tmp_path / "stored"), load_tokenizer(str(world / "student")))


@needs_bitsandbytes
@pytest.mark.slow
def test_two_ranks_under_zero2_end_as_one_process_and_resume_on_the_same_curve(tmp_path):
    tiny_model(tmp_path / "student", hidden=96)
    tiny_model(tmp_path / "teacher", hidden=48, seed=1)
    write_rows(tmp_path / "scored.jsonl", pair_rows(60))
    given = [*LORA, "--load_in_4bit", "--layout", "padded"]
    run_reward_train.main([*flags(tmp_path, tmp_path / "alone", 2), *given])
    launch(tmp_path, tmp_path / "whole", *given, zero=2)
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    launch(tmp_path, tmp_path / "resumed", *given, "--resume_from_checkpoint", str(first), zero=2)
    for one, two, again in zip(*(logged(tmp_path / name) for name in ("alone", "whole", "resumed")), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)  # products in bf16
        assert again["loss"] == pytest.approx(two["loss"], abs=1e-5)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)
