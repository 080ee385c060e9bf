"""The training scripts as a user runs them: bash, the DeepSpeed launcher, two ranks on the CPU."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import pair_rows, tiny_model, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from RewardTrainer.train import run_reward_train
from RewardTrainer.train.arguments import parse
from RewardTrainer.train.trainer import last_checkpoint

SCRIPTS = Path(run_reward_train.__file__).parents[1] / "scripts"
REPOSITORY = SCRIPTS.parents[1]
RECIPES = sorted((SCRIPTS.parent / "configs/train").glob("*.yaml"))
STEPS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "student", tied=False)
    tiny_model(root / "teacher", hidden=48, seed=1)
    write_rows(root / "scored.jsonl", pair_rows(60))
    return root


def flags(world: Path, output: Path, batch_size: int) -> list[str]:
    return [
        *("--model_name_or_path", str(world / "student"), "--teacher_model", str(world / "teacher")),
        *("--train_file", str(world / "scored.jsonl"), "--output_dir", str(output)),
        *("--per_device_train_batch_size", str(batch_size), "--gradient_accumulation_steps", "2"),
        *("--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", "2", "--learning_rate", "1e-3"),
        # Few enough tokens a chunk that ranks have different numbers of chunks: a gather a chunk would hang ZeRO-3.
        *("--chunk_size", "5", "--disable_tqdm", "true"),
    ]


def launch(
    world: Path, output: Path, *extra: str, zero: int | None, ranks: int = 2, wait: bool = True
) -> subprocess.Popen:
    """train_distilrm.sh on two ranks, from another directory; its output goes to a file beside `output`."""
    log = output.with_suffix(".log").open("ab")
    given = [*flags(world, output, batch_size=2 // ranks), *extra]
    stage = {} if zero is None else {"ZERO": str(zero)}
    process = subprocess.Popen(
        # bash traps no signal that was ignored when it began, as SIGINT is where the tests run in the background
        ["env", "--default-signal=INT", "bash", str(SCRIPTS / "train_distilrm.sh"), *given],
        cwd=world,
        env=os.environ | {"NUM_PROCESSES": str(ranks), "OMP_NUM_THREADS": "1"} | stage,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    if wait:
        try:
            code = process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            kill(process)
            raise
        assert code == 0, output.with_suffix(".log").read_text(errors="replace")[-4000:]
    return process


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the launcher and every rank."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(member.pid, signal.SIGKILL)
    process.wait()


def wait_for_a_step(process: subprocess.Popen, log: Path) -> None:
    while "'loss'" not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        time.sleep(0.01)


def logged(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [log for log in history if "loss" in log]


@pytest.fixture(scope="module")
def zero3(world) -> Path:
    launch(world, world / "zero3", zero=3)
    return world / "zero3"


@pytest.mark.slow
def test_two_ranks_under_zero3_train_as_one_process_without_deepspeed(world, zero3):
    assert "2 process(es), DEEPSPEED, ZeRO stage 3" in zero3.with_suffix(".log").read_text(errors="replace")
    run_reward_train.main(flags(world, world / "alone", batch_size=2))
    alone, both = logged(world / "alone"), logged(zero3)
    assert len(alone) == len(both) == STEPS
    for one, two in zip(alone, both, strict=True):
        for term in ("loss", "loss_reward", "loss_sft", "loss_kl", "gap"):
            assert two[term] == pytest.approx(one[term], abs=1e-3), term
    # The same held-out pairs on one rank and on two, a ragged last batch included.
    before, after = (json.loads((run / "metrics.json").read_text()) for run in (world / "alone", zero3))
    for when in ("before", "after"):
        for name, value in before[when].items():
            if name.startswith("eval_") and "second" not in name and "time" not in name:
                assert after[when][name] == pytest.approx(value, abs=1e-3), name
    AutoModelForSequenceClassification.from_pretrained(zero3)


@pytest.mark.slow
def test_one_process_under_a_configuration_of_its_own_ends_with_the_weights_of_two(world, zero3):
    launch(world, world / "single", zero=None, ranks=1)
    assert "1 process(es), DEEPSPEED, ZeRO stage 1" in (world / "single.log").read_text(errors="replace")
    for file in ("model.safetensors", "lm_head/model.safetensors"):
        one, whole = load_file(world / "single" / file), load_file(zero3 / file)
        for name in whole:
            torch.testing.assert_close(one[name], whole[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_deepspeed_run_ends_with_the_weights_of_an_uninterrupted_one(world, zero3):
    output = world / "killed"
    process = launch(world, output, zero=2, wait=False)
    while last_checkpoint(output) is None:
        assert process.poll() is None, output.with_suffix(".log").read_text(errors="replace")[-4000:]
        time.sleep(0.01)
    kill(process)
    assert not (output / "model.safetensors").exists(), "the run ended before it could be killed"
    launch(world, output, "--resume_from_checkpoint", "last", zero=2)
    assert "starting from the beginning" not in output.with_suffix(".log").read_text(errors="replace")
    # ZeRO stage 2 here, stage 3 there: the stage changes nothing but who holds what.
    for file in ("model.safetensors", "lm_head/model.safetensors"):
        resumed, whole = load_file(output / file), load_file(zero3 / file)
        assert resumed.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["script", "rank", "group", "everybody", "usr1"])
def test_sigterm_saves_a_checkpoint_that_goes_on_as_if_nothing_had_happened(world, zero3, target):
    output = world / f"stopped-{target}"
    long = ["--save_strategy", "no"]  # nothing but the signal saves
    process = launch(world, output, *long, zero=3, wait=False)
    log = output.with_suffix(".log")
    wait_for_a_step(process, log)
    tree = psutil.Process(process.pid).children(recursive=True)
    ranks = [member for member in tree if not member.children()]
    assert len(ranks) == 2
    if target == "group":  # as `timeout` does, which may be impatient
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
    elif target == "usr1":  # as Slurm's --signal=B:USR1@120 does
        os.kill(process.pid, signal.SIGUSR1)
    else:  # everybody: as `scancel` does
        members = {"script": [process.pid], "rank": [ranks[1].pid]}
        for pid in members.get(target, [member.pid for member in tree] + [process.pid]):
            os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143, log.read_text(errors="replace")[-4000:]
    assert not psutil.wait_procs(tree, timeout=10)[1]
    assert last_checkpoint(output) and not (output / "model.safetensors").exists()
    launch(world, output, *long, "--resume_from_checkpoint", "last", zero=3)
    assert "starting from the beginning" not in log.read_text(errors="replace")
    resumed, whole = load_file(output / "model.safetensors"), load_file(zero3 / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_script_that_is_killed_outright_with_its_group_leaves_no_rank(world, tmp_path):
    process = launch(world, tmp_path / "out", zero=2, wait=False)
    log = tmp_path / "out.log"
    wait_for_a_step(process, log)
    tree = psutil.Process(process.pid).children(recursive=True)
    assert tree
    os.killpg(process.pid, signal.SIGKILL)  # as `timeout --kill-after` does
    process.wait(timeout=10)
    assert not psutil.wait_procs(tree, timeout=20)[1]


@pytest.mark.slow
def test_ctrl_c_ends_every_process_with_its_own_exit_code(world, tmp_path):
    process = launch(world, tmp_path / "out", zero=2, wait=False)
    log = tmp_path / "out.log"
    wait_for_a_step(process, log)
    tree = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=120) == 130, log.read_text(errors="replace")[-4000:]
    assert not psutil.wait_procs(tree, timeout=10)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "code", "left"),
    [("--help", 0, ["new", "under_way"]), ("--no_such_flag", 2, ["under_way"])],  # a run that failed may leave its own
)
def test_lock_of_a_build_that_was_killed_is_taken_away_and_a_live_one_stays(flag, code, left, tmp_path):
    built = tmp_path / "bui[l]t"
    locks = {name: built / name / "lock" for name in ("old", "new", "under_way")}
    for name, lock in locks.items():
        lock.parent.mkdir(parents=True)
        lock.touch()
        if name != "new":
            os.utime(lock, (time.time() - 3600,) * 2)
    with locks["under_way"].open():
        done = subprocess.run(
            ["bash", str(SCRIPTS / "train_distilrm.sh"), flag],
            env=os.environ | {"TORCH_EXTENSIONS_DIR": str(built)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == code, done.stderr[-2000:]
    assert [path.parent.name for path in sorted(built.glob("*/lock"))] == left


@pytest.mark.slow
def test_checkpoint_of_other_settings_or_rows_is_not_gone_on_from(world, tmp_path):
    output = tmp_path / "out"
    run_reward_train.main(flags(world, output, batch_size=2))
    again = [*flags(world, output, batch_size=2), "--resume_from_checkpoint", "last"]
    other = write_rows(tmp_path / "other.jsonl", pair_rows(60, seed=1))
    for changed, said in (
        (["--learning_rate", "1e-4"], "learning_rate: 0.001 there, 0.0001 here"),
        (["--loss_type", "margin_regression"], "loss_type: distilrm there, margin_regression here"),
        (["--train_file", str(other)], "train_pairs: "),
        (["--eval_ratio", "0.3"], "held_out_pairs: "),
        (["--seed", "5"], "seed: 0 there, 5 here"),
        (["--train_sampling_strategy", "sequential"], "train_sampling_strategy: random there, sequential here"),
        (["--accelerator_config", '{"use_seedable_sampler": false}'], "accelerator_config: "),
    ):
        with pytest.raises(run_reward_train.InputError, match=said):
            run_reward_train.main([*again, *changed])
    run_reward_train.main([*again, "--chunk_size", "9", "--layout", "padded", "--logging_steps", "5"])
    with pytest.raises(run_reward_train.InputError, match="run.json is missing"):
        run_reward_train.main([*flags(world, output, batch_size=2), "--resume_from_checkpoint", str(world)])
    (output / f"checkpoint-{STEPS}" / "optimizer.pt").unlink()
    with pytest.raises(run_reward_train.InputError, match="is not whole any more: optimizer.pt is missing"):
        run_reward_train.main(again)


@pytest.mark.slow
def test_checkpoint_is_gone_on_from_in_other_batches_of_as_many_pairs_a_step(world, tmp_path):
    output = tmp_path / "out"
    run_reward_train.main(flags(world, output, batch_size=2))
    whole = load_file(output / "model.safetensors")
    (output / "model.safetensors").unlink()
    there = ["--resume_from_checkpoint", str(output / f"checkpoint-{STEPS - 2}")]
    other = [*flags(world, output, batch_size=1), "--gradient_accumulation_steps"]
    with pytest.raises(run_reward_train.InputError, match="pairs_a_step: 4 there, 3 here"):
        run_reward_train.main([*other, "3", *there])
    run_reward_train.main([*other, "4", *there])
    assert len(logged(output)) == STEPS
    resumed = load_file(output / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_checkpoint_whose_optimizer_deepspeed_alone_can_read_is_refused_without_it(world, zero3):
    alone = [*flags(world, zero3, batch_size=2), "--resume_from_checkpoint", "last"]
    with pytest.raises(run_reward_train.InputError, match="optimizer_state: DeepSpeed, ZeRO stage 3, 2 process"):
        run_reward_train.main(alone)


@pytest.mark.slow
def test_loss_of_one_rank_that_is_not_finite_stops_every_rank_by_itself(world, tmp_path):
    rows = pair_rows(60)
    rows[7]["margin"] = 1e38
    extra = ["--train_file", str(write_rows(tmp_path / "scored.jsonl", rows)), "--max_steps", "60"]
    process = launch(world, tmp_path / "out", *extra, zero=2, wait=False)
    try:
        code = process.wait(timeout=600)
    finally:
        if process.poll() is None:
            kill(process)
    log = (tmp_path / "out.log").read_text(errors="replace")
    assert code == 1 and not (tmp_path / "out/model.safetensors").exists(), log[-4000:]
    # Both say it: none was left waiting for the launcher to end it.
    assert log.count("the loss of training rows ['row-0-7'] is not finite") == 2, log[-4000:]


def test_teacher_of_another_vocabulary_is_refused_before_weights_and_unused_without_kl(world, tmp_path):
    teacher = tiny_model(tmp_path / "teacher", seed=1)
    student = tiny_model(tmp_path / "student")
    own = AutoTokenizer.from_pretrained(student)
    own.add_tokens(["<own>"])
    own.save_pretrained(student)
    given = [*flags(world, tmp_path / "out", batch_size=2), "--max_steps", "1"]
    given += ["--model_name_or_path", str(student), "--teacher_model", str(teacher)]
    (teacher / "model.safetensors").unlink()
    weights = (student / "model.safetensors").rename(tmp_path / "weights")  # to load either would be another error
    with pytest.raises(run_reward_train.InputError, match="--kl_weight 0"):
        run_reward_train.main(given)
    weights.rename(student / "model.safetensors")
    run_reward_train.main([*given, "--kl_weight", "0"])
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.slow
def test_script_refuses_a_teacher_of_another_vocabulary_before_it_reads_weights(world, tmp_path):
    for name in ("student", "teacher"):
        (tiny_model(tmp_path / name) / "model.safetensors").unlink()
    own = AutoTokenizer.from_pretrained(tmp_path / "student")
    own.add_tokens(["<own>"])
    own.save_pretrained(tmp_path / "student")
    process = launch(tmp_path, tmp_path / "out", "--train_file", str(world / "scored.jsonl"), zero=2, wait=False)
    assert process.wait(timeout=300) == 1
    assert "'<own>' is 314 in the student and missing in the teacher" in (tmp_path / "out.log").read_text()


def test_teacher_of_another_architecture_with_tokens_of_its_own_teaches(world, tmp_path):
    """As Qwen3 over Qwen2.5: the same ids for the student's tokens, more tokens, more padding ids."""
    teacher = tiny_model(tmp_path / "teacher", hidden=48, seed=1, vocab=448, family="qwen3")
    more = AutoTokenizer.from_pretrained(teacher)
    more.add_tokens(["<think>", "</think>"])
    more.save_pretrained(teacher)
    given = [*flags(world, tmp_path / "out", batch_size=2), "--teacher_model", str(teacher), "--learning_rate", "1e-2"]
    run_reward_train.main([*given, "--eval_ratio", "0.2", "--reward_weight", "0", "--sft_weight", "0"])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert 0 < metrics["after"]["eval_loss_kl"] < 0.95 * metrics["before"]["eval_loss_kl"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(recipe, tmp_path, monkeypatch):
    off_gpu = ["--bf16", "false"]
    _, data_args, args = parse(recipe, ["--output_dir", str(tmp_path), *off_gpu])
    assert args.warmup_steps == 0.03
    assert data_args.train_file.startswith("../")


def test_command_line_overrides_the_recipe_and_unknown_keys_are_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: a\ntrain_file: b\nlearning_rate: 1e-4\nloss_type: bt\n")
    model_args, _, args = parse(recipe, ["--learning_rate", "2e-4", "--output_dir", str(tmp_path)])
    assert (model_args.model_name_or_path, args.learning_rate, args.loss_type) == ("a", 2e-4, "bt")
    for line, said in (
        ("overlong: dropp", "invalid choice: 'dropp'"),
        ("overlong: false", "invalid choice: 'False'"),
        ("head: 1", "invalid choice: '1'"),
        ("max_steps: ten", "invalid int value: 'ten'"),
        ("max_steps: 10.5", "invalid int value: '10.5'"),
        ("limit: 2.5", "invalid int value: '2.5'"),
        ("margin_scale:", "has no value; give one, or leave it out"),
        ("max_length: null", "has no value"),
        ("train_file: [a, b]", "is a list; several files are separated by commas"),
        ("learning_rate: [1, 2]", "is a list; give one value"),
    ):
        recipe.write_text(f"model_name_or_path: a\ntrain_file: b\n{line}\n")
        with pytest.raises(
            run_reward_train.InputError, match=f"recipe.yaml: argument --{line.partition(':')[0]}: {said}"
        ):
            parse(recipe, ["--output_dir", str(tmp_path)])
    recipe.write_text("model_name_or_path: a\ntrain_file: a, ~/b\nsave_total_limit: null\nreport_to: [none]\n")
    _, data_args, args = parse(recipe, ["--output_dir", str(tmp_path), "--resume_from_checkpoint=~/c"])
    assert data_args.train_file == f"a,{Path.home()}/b" and args.save_total_limit is None
    assert args.resume_from_checkpoint == f"{Path.home()}/c"
    recipe.write_text("model_name_or_path: 123\ntrain_file: 7\nresume_from_checkpoint: true\n")
    model_args, data_args, args = parse(recipe, ["--output_dir", str(tmp_path)])
    assert (model_args.model_name_or_path, data_args.train_file, args.resume_from_checkpoint) == ("123", "7", "true")
    recipe.write_text("model_name_or_path: a\ntrain_file: b\nresume_from_checkpoint: false\n")
    assert run_reward_train.find_checkpoint(parse(recipe, ["--output_dir", str(tmp_path)])[2]) is None
    recipe.write_text("model_name_or_path: false\ntrain_file: b\n")
    with pytest.raises(
        run_reward_train.InputError, match="recipe.yaml: argument --model_name_or_path: is False; give"
    ):
        parse(recipe, ["--output_dir", str(tmp_path)])
    recipe.write_text("model_name_or_path: a\ntrain_file: b\nlearnig_rate: 1e-4\n")
    with pytest.raises(run_reward_train.InputError, match="recipe.yaml: unknown .* --learnig_rate, .*--learning_rate"):
        parse(recipe, ["--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--learnig_rate", "1e-4"], "unknown argument --learnig_rate, did you mean --learning_rate?"),
        (["--learnig_rate=1e-4"], "unknown argument --learnig_rate, did you mean --learning_rate?"),
        (["--config", "nothing.yaml"], "--config nothing.yaml: no such file"),
        (["--attn_implementation", "egaer"], "--attn_implementation egaer: not one of eager, "),
        (["--layout", "packed"], "argument --layout: invalid choice: 'packed' (choose from "),
        (["--max_steps", "ten"], "argument --max_steps: invalid int value: 'ten' (--help shows all flags)"),
        (["--chunk_size", "0"], "--chunk_size 0: must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: must be at least 1"),
        (["--max_steps", "0", "--num_train_epochs", "0"], "--num_train_epochs 0: must be above 0, or give --max_s"),
        (["--eval_strategy", "steps", "--eval_steps", "0", "--logging_steps", "0"], "non-zero"),
    ],
)
def test_command_line_that_cannot_be_used_ends_in_one_line(given, message, tmp_path):
    command = [sys.executable, "-m", "RewardTrainer.train.run_reward_train", "--output_dir", tmp_path, *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr and "usage" not in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr_scheduler_type", "cosine_with_min_lr"], "error: ValueError: One of min_lr or min_lr_rate should be"),
        (["--learning_rate", "-1"], "error: ValueError: Invalid learning rate: -1.0"),
        (["--optim", "lomo"], "error: ImportError: You need to install `lomo_optim`"),
    ],
)
def test_what_a_library_refuses_is_said_in_one_line(world, tmp_path, given, message):
    command = [
        sys.executable,
        "-m",
        "RewardTrainer.train.run_reward_train",
        *flags(world, tmp_path / "out", 2),
        *given,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_weight_that_the_loss_ignores_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="kl_weight"):
        run_reward_train.main(["--loss_type", "bt", "--kl_weight", "1", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss_type", "bt", "--margin_scale", "1", "--kl_temperature", "2"],
        ["--label_smoothing_factor", "0.1"],
        ["--neftune_noise_alpha", "5"],
        ["--train_sampling_strategy", "group_by_length"],
        ["--batch_eval_metrics", "true"],
        ["--eval_do_concat_batches", "false"],
        ["--include_for_metrics", "inputs"],
        ["--bf16_full_eval", "true"],
        ["--fp16_full_eval", "true"],
        ["--dataloader_drop_last", "true"],
        ["--include_num_input_tokens_seen", "true"],
        ["--auto_find_batch_size", "true"],
        ["--torch_compile", "true"],
    ],
)
def test_flag_that_would_be_ignored_is_refused(flags, tmp_path):
    with pytest.raises(run_reward_train.InputError, match=flags[-2]):
        run_reward_train.main([*flags, "--output_dir", str(tmp_path)])


def test_figures_of_a_run_that_was_gone_on_from_are_those_of_the_whole_run(world, tmp_path, caplog):
    output = tmp_path / "out"
    caplog.set_level(logging.INFO)
    given = [*flags(world, output, batch_size=2), "--logging_steps", "2", "--save_steps", "0.35"]
    given += ["--max_steps", "-1", "--num_train_epochs", "1"]

    def figures() -> dict:
        return json.loads((output / "metrics.json").read_text())["train"]

    run_reward_train.main(given)
    whole = figures()
    assert "resumed_at_step" not in whole
    run_reward_train.main([*given, "--resume_from_checkpoint", str(output / "checkpoint-10"), "--save_steps", "13"])
    assert "going on from step 10 of 14" in caplog.text and "do not match" not in caplog.text
    assert (output / "checkpoint-13").is_dir()  # as this command says, not as the first one did
    resumed = figures()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["train_loss"] == resumed["train_loss"]  # what the console shows
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)
    assert resumed["resumed_at_step"] == 10
    assert resumed["train_steps_per_second"] == pytest.approx(4 / resumed["train_runtime"], rel=1e-3)
    run_reward_train.main([*given, "--resume_from_checkpoint", "last"])
    assert figures() == resumed


def test_a_finished_run_is_exported_anew_and_not_trained_further(world, tmp_path):
    output = tmp_path / "out"
    given = [*flags(world, output, batch_size=2), "--max_steps", "5", "--logging_steps", "3", "--save_steps", "5"]
    given += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "1e-3"]
    run_reward_train.main(given)
    weights = (output / "model.safetensors").read_bytes()
    before = json.loads((output / "metrics.json").read_text())
    for _ in range(2):
        run_reward_train.main([*given, "--resume_from_checkpoint", "last", "--save_lm", "true"])
        assert (output / "model.safetensors").read_bytes() == weights and (output / "lm").is_dir()
        after = json.loads((output / "metrics.json").read_text())
        assert (after["train"], after["speed"]) == (before["train"], before["speed"])
        assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-5"]
    (output / "metrics.json").unlink()  # as where the export was killed
    run_reward_train.main([*given, "--resume_from_checkpoint", "last"])
    assert (output / "model.safetensors").read_bytes() == weights
    assert json.loads((output / "metrics.json").read_text())["train"]["resumed_at_step"] == 5


def test_nothing_of_an_earlier_model_stays_beside_another_one(world, tmp_path):
    output = tmp_path / "out"
    given = [*flags(world, output, batch_size=2), "--max_steps", "1", "--save_strategy", "no"]
    run_reward_train.main([*given, "--head", "mlp", "--use_peft", "--save_lm", "true", "--eval_ratio", "0.2"])
    first = {path.name for path in output.iterdir()}
    assert {"adapter", "lm", "held_out.jsonl", "modeling_mlp_reward.py"} <= first
    run_reward_train.main([*given, "--loss_type", "bt", "--margin_scale", "1", "--eval_ratio", "0"])
    assert not {"adapter", "lm", "held_out.jsonl", "modeling_mlp_reward.py"} & {path.name for path in output.iterdir()}
    AutoModelForSequenceClassification.from_pretrained(output)


def test_what_is_not_a_runs_own_is_not_taken_away(world, tmp_path):
    given = [*flags(world, tmp_path / "out", batch_size=2), "--max_steps", "1", "--save_strategy", "no"]
    (tmp_path / "out/lm").mkdir(parents=True)
    (tmp_path / "out/lm/mine").touch()
    run_reward_train.main([*given, "--eval_ratio", "0.2"])
    assert (tmp_path / "out/lm/mine").exists()  # another run may have `out/lm` as its directory
    held_out = (tmp_path / "out/held_out.jsonl").read_bytes()
    for flag in ("--eval_file", "--train_file"):
        with pytest.raises(run_reward_train.InputError, match="held_out.jsonl is what this run replaces"):
            run_reward_train.main([*given, "--eval_ratio", "0", flag, str(tmp_path / "out/held_out.jsonl")])
    assert (tmp_path / "out/held_out.jsonl").read_bytes() == held_out
    shutil.rmtree(tmp_path / "out/lm")
    run_reward_train.main([*given, "--save_lm", "true"])
    lm = tmp_path / "out/lm"
    with pytest.raises(run_reward_train.InputError, match=r"out/lm is part of .*/out, which this run replaces"):
        run_reward_train.main([*given, "--model_name_or_path", str(lm)])
    lm.rename(tmp_path / "elsewhere")
    lm.symlink_to(tmp_path / "elsewhere")
    run_reward_train.main(given)
    assert not lm.exists() and (tmp_path / "elsewhere/config.json").exists()


@pytest.mark.parametrize("fault", ["torn", "other shape"])
def test_weights_that_cannot_be_loaded_end_training_in_a_line(world, tmp_path, fault):
    student = tiny_model(tmp_path / "student", tied=False)
    weights = student / "model.safetensors"
    if fault == "torn":
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        config = json.loads((student / "config.json").read_text())
        (student / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    given = [*flags(world, tmp_path / "out", batch_size=2), "--model_name_or_path", str(student)]
    with pytest.raises(run_reward_train.InputError, match="student: cannot be loaded: "):
        run_reward_train.main(given)


def test_pairs_that_the_chat_template_makes_equal_are_named_and_left_out(world, tmp_path, caplog):
    student = tiny_model(tmp_path / "student", tied=False)
    template = student / "chat_template.jinja"
    content = "message['content']"
    assert content in template.read_text()
    template.write_text(template.read_text().replace(content, f"{content}.split('</think>')[-1]"))
    rows = pair_rows(12)
    for row in rows[:5]:
        row["chosen"], row["rejected"] = (f"<think>{n}</think>The answer is 3." for n in (1, 2))
    given = [*flags(world, tmp_path / "out", batch_size=2), "--model_name_or_path", str(student), "--max_steps", "1"]
    given += ["--loss_type", "bt", "--margin_scale", "1", "--eval_ratio", "0", "--train_file"]
    run_reward_train.main([*given, str(write_rows(tmp_path / "some.jsonl", rows))])
    counts = json.loads((tmp_path / "out/metrics.json").read_text())["counts"]["train"]
    assert counts["pairs"] == 7 and counts["equal_tokens"] == 5
    assert "row-0-0, row-0-1, row-0-2, row-0-3, row-0-4; what differs may be" in caplog.text
    with pytest.raises(run_reward_train.InputError, match="5 equal_tokens.*chat template leaves out"):
        run_reward_train.main([*given, str(write_rows(tmp_path / "all.jsonl", rows[:5]))])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_are_no_longer_than_the_model_takes(world, tmp_path, caplog, side):
    path = tiny_model(tmp_path / side, **({"tied": False} if side == "student" else {"hidden": 48, "seed": 1}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    rows = pair_rows(12)
    rows[3]["prompt"] += " please" * 20
    given = [*flags(world, tmp_path / "out", batch_size=2), "--max_steps", "1", "--eval_ratio", "0"]
    given += ["--model_name_or_path" if side == "student" else "--teacher_model", str(path)]
    given += ["--train_file", str(write_rows(tmp_path / "rows.jsonl", rows))]
    said = {"student": "more than --max_length 40", "teacher": "tokens to the teacher, which takes 40; leave it out"}
    with pytest.raises(run_reward_train.InputError, match=f"row-0-3 has .* {said[side]}"):
        run_reward_train.main([*given, "--overlong", "error"])
    run_reward_train.main([*given, "--overlong", "drop"])
    reason = {"student": "overlong", "teacher": "overlong_to_teacher"}[side]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["counts"]["train"][reason] >= 1
    run_reward_train.main([*given, "--overlong", "truncate_prompt"])
    assert side == "teacher" or "--max_length 512 is over what the student takes; it is 40" in caplog.text
    assert json.loads((tmp_path / "out/metrics.json").read_text())["counts"]["train"]["truncated"] >= 1


def test_home_directory_in_a_recipe_and_further_training_of_a_finished_model(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "world").symlink_to(world)
    recipe = tmp_path / "recipe.yaml"
    names = {"model_name_or_path": "student", "teacher_model": "teacher", "train_file": "scored.jsonl"}
    lines = [f"{name}: ~/world/{path}" for name, path in names.items()]
    recipe.write_text("\n".join([*lines, "output_dir: ~/first", "max_steps: 2", "save_strategy: 'no'"]))
    run_reward_train.main(["--config", str(recipe)])
    run_reward_train.main(["--config", str(recipe), "--model_name_or_path=~/first", "--output_dir=~/second"])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_checkpoint_without_the_optimizer_is_not_gone_on_from(world, tmp_path):
    given = [*flags(world, tmp_path / "out", batch_size=2), "--save_only_model", "true", "--max_steps", "2"]
    given += ["--save_strategy", "steps", "--save_steps", "1"]
    run_reward_train.main(given)
    checkpoint = tmp_path / "out/checkpoint-2"
    assert (checkpoint / "model.safetensors").exists() and last_checkpoint(tmp_path / "out") is None
    with pytest.raises(run_reward_train.InputError, match="--save_only_model left the optimizer out"):
        run_reward_train.main([*given, "--resume_from_checkpoint", str(checkpoint)])


def test_language_model_that_is_not_there_is_refused_before_training(world, tmp_path):
    start = AutoModelForSequenceClassification.from_pretrained(world / "student", num_labels=1)
    start.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(world / "student").save_pretrained(tmp_path / "rm")
    given = [*flags(world, tmp_path / "out", batch_size=2), "--model_name_or_path", str(tmp_path / "rm")]
    with pytest.raises(run_reward_train.InputError, match="--save_lm"):
        run_reward_train.main([*given, "--loss_type", "bt", "--margin_scale", "1", "--save_lm"])


@pytest.mark.slow
def test_zero3_file_that_could_not_save_a_model_is_refused_before_training(world, tmp_path):
    settings = json.loads((SCRIPTS.parent / "configs/deepspeed/zero3.json").read_text())
    del settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    process = launch(world, tmp_path / "out", "--deepspeed", str(tmp_path / "mine.json"), zero=3, wait=False)
    assert process.wait(timeout=300) != 0
    assert "stage3_gather_16bit_weights_on_model_save" in (tmp_path / "out.log").read_text()


@pytest.mark.parametrize(
    ("path", "message"),
    [("./nothing-here", "no such directory"), ("examples/student", "did you mean ../examples/student?")],
)
def test_missing_model_directory_is_named(path, message, world, tmp_path, monkeypatch):
    monkeypatch.chdir(SCRIPTS.parent)
    with pytest.raises(run_reward_train.InputError, match=re.escape(message)):
        run_reward_train.main([*flags(world, tmp_path / "out", batch_size=2), "--model_name_or_path", path])


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--teacher_model"])
def test_model_that_the_hub_does_not_give_is_named_with_the_remedy(flag, world, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(run_reward_train.InputError, match=r"^owner/none is no directory here .* give a local dir"):
        run_reward_train.main([*flags(world, tmp_path / "out", batch_size=2), flag, "owner/none"])


def test_missing_file_of_rows_is_named_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.jsonl").write_text("{}\n")
    (tmp_path / "RewardTrainer").mkdir()
    monkeypatch.chdir(tmp_path / "RewardTrainer")
    monkeypatch.setattr(run_reward_train, "set_up", None)
    for flag, rest in (("--train_file", ()), ("--eval_file", ("--train_file", "../data/mine.jsonl"))):
        with pytest.raises(run_reward_train.InputError, match=r"did you mean \.\./data/mine\.jsonl\?"):
            run_reward_train.main([flag, "data/mine.jsonl", *rest, "--output_dir", str(tmp_path)])
    with pytest.raises(run_reward_train.InputError, match=r"refine_response_vllm.py and then .*cali_score_vllm.py"):
        run_reward_train.main(["--train_file", "../data/other.jsonl", "--output_dir", str(tmp_path)])


def test_rows_held_out_are_written_beside_the_model_and_their_metrics_are_logged(world, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run_reward_train.main([*flags(world, tmp_path / "out", batch_size=2), "--eval_ratio", "0.2"])
    accuracy = json.loads((tmp_path / "out/metrics.json").read_text())["after"]["eval_accuracy"]
    assert f"held out, after training: accuracy {accuracy:.4g}, mean_gap" in caplog.text
    rows = pair_rows(60)
    held_out = [json.loads(line) for line in (tmp_path / "out/held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 12 and all(row in rows for row in held_out)


def test_baseline_trains_on_original_pairs_and_writes_its_metrics(tmp_path):
    tiny_model(tmp_path / "student")
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in pair_rows(20)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    output = tmp_path / "rm"
    run_reward_train.main(
        [
            *("--config", str(SCRIPTS.parent / "configs/train/example_bt.yaml"), "--output_dir", str(output)),
            *("--model_name_or_path", str(tmp_path / "student"), "--train_file", str(tmp_path / "pairs.jsonl")),
            *("--num_train_epochs", "1", "--save_lm", "true", "--disable_tqdm", "true"),
        ]
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["counts"]["train"]["pairs"] + metrics["counts"]["eval"]["pairs"] == 20
    assert 0 <= metrics["before"]["eval_accuracy"] <= 1 and 0 <= metrics["after"]["eval_accuracy"] <= 1
    assert AutoModelForSequenceClassification.from_pretrained(output).config.num_labels == 1
    assert (output / "lm/model.safetensors").exists()


@pytest.mark.slow
def test_zero3_trains_an_mlp_head_in_bf16_with_gradient_checkpointing(world):
    output = world / "bf16"
    extra = ["--bf16", "true", "--gradient_checkpointing", "true", "--head", "mlp", "--save_lm", "true"]
    launch(world, output, *extra, "--max_steps", "2", zero=3)
    assert all(0 < log["loss"] < 100 for log in logged(output))
    model = AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=True)
    assert model.dtype == torch.bfloat16 and model.classifier[0].weight.shape[0] == 1024
    assert (output / "lm/model.safetensors").exists()
