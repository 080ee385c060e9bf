"""Training from cached log-probabilities beside training from the live teacher; what is refused, and the way out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train_launch import launch, logged
from train_fixtures import make_trainer, pair_rows, tiny_model, write_cache, write_rows

from distiller.manifest import Manifest, model_fingerprint
from distiller.records import InputError
from RewardTrainer.train import run_reward_train

ROOT = Path(__file__).parents[1]
VOCAB = 400  # of the teacher; the student knows 384, of which its tokenizer uses 320 or less
ONE_SGD_STEP = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "max_steps": 1,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    student = tiny_model(root / "student")
    teacher = tiny_model(root / "teacher", hidden=48, seed=1, vocab=VOCAB)
    tiny_model(root / "sibling", hidden=48, seed=2, vocab=VOCAB)
    tiny_model(root / "larger", hidden=48, seed=1, vocab=VOCAB + 16)
    rows = pair_rows(12)
    write_rows(root / "scored.jsonl", rows)
    write_cache(root / "whole", rows, student, teacher, VOCAB)
    write_cache(root / "top", rows, student, teacher, 8)
    for name in ("whole", "top"):
        made_from = {"model_files": model_fingerprint(str(teacher)), "inputs": {"input": []}}
        Manifest(made_from).save(root / f"{name}.manifest.json")
    return root


def train(world: Path, tmp_path: Path, **arguments) -> tuple[dict, dict[str, torch.Tensor]]:
    """One step from the fixture's rows: what was logged, and the weights after it."""
    arguments = {"per_device_train_batch_size": 6} | ONE_SGD_STEP | arguments
    trainer = make_trainer(world / "student", tmp_path, pair_rows(6), world / "teacher", **arguments)
    trainer.train()
    return trainer.state.log_history[0], {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"layout": "padded"},
        {"layout": "padding_free", "max_tokens_per_batch": 60},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "chunk_size": 5},
        {"kl_temperature": 2.0, "kl_tail": "renormalize"},
    ],
    ids=str,
)
def test_step_from_a_cache_of_all_ids_is_the_step_with_the_live_teacher(world, tmp_path, arguments):
    live_arguments = {name: value for name, value in arguments.items() if name != "kl_tail"}
    live, live_weights = train(world, tmp_path, **live_arguments)
    cached, weights = train(world, tmp_path, cached=world / "whole", **arguments)
    # Half precision of the cache: 1/2048 of the entropy, which is under 6 nats here.
    for term in ("loss", "loss_reward", "loss_sft", "loss_kl"):
        assert cached[term] == pytest.approx(live[term], abs=3e-3), term
    for name, tensor in live_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-3, msg=lambda t, name=name: f"{name}: {t}")
    assert not torch.equal(weights["score.weight"], train(world, tmp_path, learning_rate=0.0)[1]["score.weight"])


def test_few_ids_are_another_kl_in_each_form_and_change_no_other_term(world, tmp_path):
    live, _ = train(world, tmp_path)
    logs = {tail: train(world, tmp_path, cached=world / "top", kl_tail=tail)[0] for tail in ("bucket", "renormalize")}
    for log in logs.values():
        assert log["loss_sft"] == pytest.approx(live["loss_sft"], rel=1e-6)
        assert log["loss_reward"] == pytest.approx(live["loss_reward"], rel=1e-6)
    kl = [logs["bucket"]["loss_kl"], logs["renormalize"]["loss_kl"]]
    assert all(value > 0 for value in kl) and kl[0] < live["loss_kl"]
    assert len({round(value, 4) for value in (*kl, live["loss_kl"])}) == 3


def test_evaluation_from_the_cache_is_that_of_the_live_teacher(world, tmp_path):
    results = []
    for more in ({}, {"cached": world / "whole"}, {"cached": world / "whole", "max_tokens_per_batch": 70}):
        trainer = make_trainer(
            world / "student", tmp_path, pair_rows(4), world / "teacher", eval_rows=pair_rows(12)[5:],
            per_device_eval_batch_size=3, **more,
        )  # fmt: skip
        metrics = trainer.evaluate()
        results.append({name: value for name, value in metrics.items() if "second" not in name and "time" not in name})
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=3e-3)
    assert results[0]["eval_loss_kl"] > 0.1


def test_row_whose_cached_bytes_are_damaged_stops_the_run(world, tmp_path):
    damaged = write_cache(tmp_path / "damaged", pair_rows(6), world / "student", world / "teacher", 8)
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    trainer = make_trainer(
        world / "student", tmp_path, pair_rows(6), world / "teacher", cached=damaged, **ONE_SGD_STEP
    )
    header = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + header])["top_logprobs"]["data_offsets"]
    content[8 + header + begin] ^= 255
    with shard.open("r+b") as file:  # the same file: it is mapped already
        file.write(content)
    with pytest.raises(InputError, match="damaged"):
        trainer.train()


# ---------------------------------------------------------------- the command


def flags(world: Path, output: Path, **more) -> list[str]:
    values = {"model_name_or_path": world / "student", "train_file": world / "scored.jsonl", "output_dir": output}
    values |= {"teacher_logprobs": world / "top", "max_steps": 2, "per_device_train_batch_size": 4, "eval_ratio": 0.2}
    values |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": "true", "loss_type": "distilrm"}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in (values | more).items()}
    config = world / "recipe.yaml"  # one of its own: the example's names another teacher
    config.write_text("".join(f"{name}: {value!r}\n" for name, value in values.items() if value is not None))
    return ["--config", str(config)]


@pytest.fixture
def no_models(monkeypatch) -> None:
    """Whatever loads a model fails the test."""

    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run_reward_train, "load_student", load)
    monkeypatch.setattr(run_reward_train.LiveTeacher, "load", load)


def refusal(world: Path, tmp_path: Path, **more) -> str:
    with pytest.raises(InputError) as fault:
        run_reward_train.main(flags(world, tmp_path / "run", **more))
    return str(fault.value)


def test_command_trains_and_evaluates_without_any_teacher_in_memory(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run_reward_train.LiveTeacher, "load", None)
    for name, teacher in (("named by the cache", None), ("said again", world / "teacher")):
        run_reward_train.main(flags(world, tmp_path / name, teacher_model=teacher))
        log = logged(tmp_path / name)
        assert len(log) == 2 and all(entry["loss_kl"] > 0 for entry in log)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["before"]["eval_loss_kl"] > 0 and metrics["after"]["eval_loss_kl"] > 0


def test_rows_that_are_not_cached_are_counted_and_the_command_that_makes_them_is_named(world, tmp_path, no_models):
    rows = pair_rows(12)
    rows[3]["id"], rows[9]["id"] = "new-a", "new-b"
    other = write_rows(tmp_path / "other rows.jsonl", rows)
    said = refusal(world, tmp_path, train_file=other, eval_ratio=0.3)
    assert "2 of 12 rows" in said and "new-" in said
    assert f"--input '{other}' --output {world / 'top'} " in said and "--top_k_logprobs 8" in said
    assert f"--student_model {world / 'student'}" in said and f"--model {world / 'teacher'}" in said
    assert said.endswith(" --overwrite")  # the cache is of another file


def test_held_out_rows_must_be_cached_too(world, tmp_path, no_models):
    held_out = write_rows(tmp_path / "held_out.jsonl", pair_rows(3, seed=8))
    said = refusal(world, tmp_path, eval_file=held_out, eval_ratio=0.0)
    assert "3 of 15 rows" in said and f"cat {world / 'scored.jsonl'} {held_out} > {world / 'top'}.rows.jsonl" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher_response": "red stone river"}, "another response"),
        ({"prompt": "name the blue cloud"}, "another prompt"),
    ],
    ids=["response", "prompt"],
)
def test_changed_row_is_refused_by_name(world, tmp_path, no_models, change, said):
    rows = pair_rows(12)
    rows[7] |= change
    changed = write_rows(tmp_path / "changed.jsonl", rows)
    message = refusal(world, tmp_path, train_file=changed)
    assert said in message and rows[7]["id"] in message


def test_prompt_that_is_cut_here_and_not_in_the_cache_is_refused(world, tmp_path, no_models):
    rows = pair_rows(12)
    rows[7]["prompt"] = "red " * 120
    write_cache(tmp_path / "top", rows, world / "student", world / "teacher", 8)
    source = write_rows(tmp_path / "long.jsonl", rows)
    cut = {"train_file": source, "teacher_logprobs": tmp_path / "top", "overlong": "truncate_prompt"}
    assert "--overlong drop" in refusal(world, tmp_path, **cut, max_length=100)
    rows[7]["teacher_response"] = "red stone river"
    write_rows(source, rows)
    assert "another response" in refusal(world, tmp_path, **cut, max_length=100)


def test_other_tokenizer_is_refused_before_a_model_loads(world, tmp_path, no_models):
    other = tiny_model(tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    first = min((name for name in vocabulary if len(name) == 1 and name.isalpha()), key=vocabulary.get)
    vocabulary[last], vocabulary[first] = vocabulary[first], vocabulary[last]
    file.write_text(json.dumps(tokenizer))
    assert "are not the teacher's" in refusal(world, tmp_path, model_name_or_path=other)


@pytest.mark.parametrize("name", ["sibling", "larger"])
def test_other_teacher_beside_the_cache_is_refused(world, tmp_path, no_models, name):
    said = refusal(world, tmp_path, teacher_model=world / name)
    assert "is not the teacher of --teacher_logprobs" in said and str(world / "teacher") in said
    (tmp_path / "alone").symlink_to(world / "top")  # without its manifest the number of logits still tells
    if name == "larger":
        said = refusal(world, tmp_path, teacher_model=world / name, teacher_logprobs=tmp_path / "alone")
        assert "is not the teacher of --teacher_logprobs" in said


def test_teacher_that_is_gone_is_asked_for(world, tmp_path, no_models):
    gone = tiny_model(tmp_path / "gone", hidden=48, seed=1, vocab=VOCAB)
    cache = write_cache(tmp_path / "cache", pair_rows(12), world / "student", gone, 8)
    gone.rename(tmp_path / "moved")
    assert "--teacher_model" in refusal(world, tmp_path, teacher_logprobs=cache)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kl_temperature": 2.0}, "needs --kl_tail renormalize"),
        ({"kl_temperature": 2.0, "kl_tail": "bucket"}, "needs --kl_tail renormalize"),
        ({"teacher_logprobs": None, "kl_tail": "bucket"}, "a live teacher has no tail"),
        ({"kl_weight": 0}, "--teacher_logprobs would be ignored"),
        ({"loss_type": "margin_regression"}, "--teacher_logprobs would be ignored"),
        ({"teacher_logprobs": "nowhere"}, "refine/cache_teacher_logprobs_vllm.py --input"),
        ({"teacher_logprobs": None}, "give --teacher_model or --teacher_logprobs"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_kept_are_refused(world, tmp_path, no_models, more, said):
    assert said in refusal(world, tmp_path, **more)


# ---------------------------------------------------------------- the round trip, and several ranks


def example_rows(count: int) -> list[dict]:
    """Scored rows of the embedded world, with the better response for the teacher's own."""
    rows = [json.loads(line) for line in (ROOT / "examples/data/pairs.jsonl").read_text().splitlines()[:count]]
    return [row | {"teacher_response": row["chosen"], "margin": float(n % 5)} for n, row in enumerate(rows)]


@pytest.mark.slow
def test_run_that_lacks_its_cache_names_the_command_and_then_trains_as_with_the_live_teacher(tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    models = {"model_name_or_path": ROOT / "examples/student", "teacher_model": ROOT / "examples/teacher"}
    models |= {"max_steps": 3, "max_length": 512}
    missing = []
    for count in (8, 24):  # no cache, and then one of a part of the rows
        write_rows(world / "scored.jsonl", example_rows(count))
        missing.append(refusal(world, tmp_path, teacher_logprobs=world / "cache", **models))
        command = re.search(r"\n {4}(python .*)$", missing[-1])[1]
        done = subprocess.run(
            ["bash", "-c", f"{command} --top_k_logprobs 896"],  # all that the teacher knows
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert "no cached log-probabilities" in missing[0] and "16 of 24 rows" in missing[1]
    run_reward_train.main(flags(world, tmp_path / "live", teacher_logprobs=None, **models))
    run_reward_train.main(flags(world, tmp_path / "cached", teacher_logprobs=world / "cache", **models))
    for live, cached in zip(logged(tmp_path / "live"), logged(tmp_path / "cached"), strict=True):
        for term in ("loss", "loss_reward", "loss_sft", "loss_kl", "gap"):
            assert cached[term] == pytest.approx(live[term], abs=2e-3, rel=1e-3), term
    live_card, cached_card = ((tmp_path / name / "README.md").read_text() for name in ("live", "cached"))
    assert "| `teacher_model` |" in live_card and "teacher_logprobs" not in live_card
    assert "| `teacher_logprobs` | cache |" in cached_card and "| `kl_tail` | bucket |" in cached_card
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("live", "cached")]
    for when in ("before", "after"):
        assert metrics[1][when]["eval_loss_kl"] == pytest.approx(metrics[0][when]["eval_loss_kl"], abs=2e-3, rel=1e-3)


@pytest.mark.slow
def test_two_ranks_under_zero3_train_from_the_cache_as_one_process(world, tmp_path):
    budget = {"max_tokens_per_batch": 80, "kl_tail": "bucket", "teacher_model": None}
    run_reward_train.main(flags(world, tmp_path / "alone", **budget))
    config = flags(world, tmp_path / "both", **budget, per_device_train_batch_size=2)[1]
    # What `launch` says of models and rows stands in the recipe too; of the rest, its own would win.
    more = ["--config", config, "--teacher_logprobs", str(world / "top"), "--max_steps", "2"]
    more += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-5"]
    launch(world, tmp_path / "both", *more, zero=3)
    alone, both = logged(tmp_path / "alone"), logged(tmp_path / "both")
    assert len(alone) == len(both) == 2
    for one, two in zip(alone, both, strict=True):
        for term in ("loss", "loss_reward", "loss_sft", "loss_kl", "gap"):
            assert two[term] == pytest.approx(one[term], abs=1e-3), term
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "both")]
    assert metrics[1]["after"]["eval_loss_kl"] == pytest.approx(metrics[0]["after"]["eval_loss_kl"], abs=1e-3)
