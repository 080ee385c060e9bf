"""What only a GPU shows: FlexAttention's and liger-kernel's own kernels, and that nothing waits or is compiled anew.

Run by `make test-gpu`; skipped where there is no GPU.
"""

import json
import random
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_fixtures import MODELS, build, build_deep
from test_packing import random_pairs
from torch._dynamo.utils import counters
from train_fixtures import make_trainer, pair_rows, tiny_model, write_rows
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import is_liger_kernel_available

from RewardTrainer.fused_layers import use_fused_layers
from RewardTrainer.packing import kernel_of, pack, run_packed, serve_segments
from RewardTrainer.packing_trial import distance, judge, padded_states, trial_rows
from RewardTrainer.train.student import choose_layout

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def layers_of_no_other_test():
    """liger-kernel's rotary embeddings are in a model's file, not in the model."""
    before = dict(vars(modeling_qwen2))
    yield
    vars(modeling_qwen2).update(before)


def packed_states(model, pairs: list[list[np.ndarray]]) -> torch.Tensor:
    ids, positions, segments, _ = pack(pairs, share=True)
    return run_packed(model, ids.to(model.device), positions.to(model.device), segments)[0]


@pytest.mark.parametrize("name", MODELS)
def test_flex_attention_gives_the_states_and_gradients_of_a_cpu(name):
    """In fp32. The tiny models' heads are of 8 dimensions, which FlexAttention's kernels do not take: here of 32."""
    config = MODELS[name]
    config = type(config)(**config.to_dict() | {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4})
    pairs = [pair for seed in range(6) for pair in random_pairs(random.Random(seed))]
    weight = torch.randn(128, generator=torch.Generator().manual_seed(0))
    gradients = []
    for device in ("cpu", "cuda"):
        model = build(config).to(device)
        serve_segments(model)
        assert kernel_of(model.config, model.device) == {"cpu": "segments", "cuda": "flex"}[device]
        torch.tanh(packed_states(model, pairs) @ weight.to(device)).sum().backward()
        gradients.append({name: parameter.grad.cpu() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert distance(gradients[1][name].flatten()[None], expected.flatten()[None]) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_36_random_layers_are_accepted(dtype):
    verdict = judge(build_deep(dtype).to(CUDA), runnable=True)
    assert verdict.reason is None, verdict
    assert verdict.note.startswith("flex attention; tried")


def test_nothing_is_compiled_for_another_length():
    model = build_deep(torch.bfloat16).to(CUDA)
    assert judge(model, runnable=True).reason is None
    rng, graphs = random.Random(0), []
    for count in (3, 1, 40, 7, 90, 2):
        pairs = [pair for _ in range(count) for pair in random_pairs(rng)]
        before = counters["stats"]["unique_graphs"]
        packed_states(model, pairs).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert not any(graphs[1:]), graphs


def test_the_choices_of_attention_give_one_loss_packed_where_they_can_be(tmp_path):
    student = tiny_model(tmp_path / "student", hidden=128)
    layouts, losses = {}, {}
    for name in ("sdpa", "flex_attention", "eager"):
        trainer = make_trainer(student, tmp_path, pair_rows(6), loss_type="bt")
        trainer.model.to(CUDA)
        trainer.model.backbone.set_attn_implementation(name)
        layouts[name] = trainer.collate.layout = choose_layout("student", trainer.model.backbone, None)
        batch = trainer._prepare_inputs(trainer.collate(trainer.train_dataset))
        losses[name] = trainer.compute_loss(
            trainer.model, batch, num_items_in_batch=torch.tensor(6, device=CUDA)
        ).item()
    assert layouts == {"sdpa": "shared_prefix", "flex_attention": "shared_prefix", "eager": "padded"}
    assert losses["flex_attention"] == pytest.approx(losses["sdpa"], abs=1e-4)
    assert losses["eager"] == pytest.approx(losses["sdpa"], abs=1e-4)


@pytest.mark.skipif(not is_liger_kernel_available(), reason="needs liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_layers_are_the_models_own_in_states_and_gradients(dtype):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2Model(config).to(CUDA, dtype)
    rows = trial_rows(1000)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(torch.tanh(states).sum() for states in padded_states(model, rows)).backward()
        return {name: parameter.grad.float().clone() for name, parameter in model.named_parameters()}

    own = gradients()
    norm = modeling_qwen2.Qwen2RMSNorm
    assert "liger-kernel's layers" in use_fused_layers(model, CUDA)
    assert modeling_qwen2.Qwen2RMSNorm is norm  # of the next model
    for name, gradient in gradients().items():
        apart = distance(gradient.flatten()[None], own[name].flatten()[None])
        assert apart < (1e-4 if dtype == torch.float32 else 5e-2), name
    assert judge(model, runnable=True).reason is None


def test_a_training_step_waits_for_the_gpu_once_at_most(tmp_path):
    """From the moment that the data loader is asked: two batches, then their forward and backward passes."""
    student = tiny_model(tmp_path / "student", hidden=128)
    teacher = tiny_model(tmp_path / "teacher", hidden=128, seed=1)
    trainer = make_trainer(
        student, tmp_path, pair_rows(64), teacher, max_steps=6, bf16=True, logging_steps=1000,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    waits: list[list[str]] = []

    def watched(stock):
        def call(*arguments):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = stock(*arguments)
            torch.cuda.set_sync_debug_mode("default")
            waits[-1] += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
            return result

        return call

    fetch = watched(trainer.get_batch_samples)
    trainer.get_batch_samples = lambda *arguments: (waits.append([]), fetch(*arguments))[1]
    trainer.training_step = watched(trainer.training_step)
    trainer.train()
    assert len(waits) == 6 and max(map(len, waits[2:])) <= 1, waits


@pytest.mark.parametrize("precision", [[], ["--bf16", "true"]], ids=["fp32", "bf16"])
def test_the_scripts_train_and_evaluate_on_the_gpu(tmp_path, precision):
    rows = pair_rows(64)
    write_rows(tmp_path / "scored.jsonl", rows)
    student, teacher = tiny_model(tmp_path / "s", hidden=128), tiny_model(tmp_path / "t", hidden=128, seed=1)
    flags = ["--model_name_or_path", student, "--teacher_model", teacher, "--train_file", tmp_path / "scored.jsonl"]
    flags += [
        "--output_dir",
        tmp_path / "rm",
        "--max_steps",
        8,
        "--logging_steps",
        1,
        "--save_strategy",
        "no",
        *precision,
    ]

    def run(script: str, *arguments) -> str:
        command = ["bash", REPOSITORY / "RewardTrainer/scripts" / script, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    said = run("train_distilrm.sh", *flags)
    assert said.count("layout shared_prefix, flex attention; tried") == 2, said
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    run("eval_rm.sh", "--model", tmp_path / "rm", "--benchmarks", pairs, "--output_dir", tmp_path / "eval")
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert next(iter(results["benchmarks"].values()))["subsets"]
