"""What scripts/train_distilrm.sh hands to DeepSpeed's launcher: GPUs, recipe and ZeRO configuration.

Stand-ins on PATH: a launcher that prints its arguments, and a `python` that counts four GPUs.
"""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from RewardTrainer.train.arguments import NO_PLACE, DistilConfig

SCRIPT = Path(__file__).parents[1] / "RewardTrainer/scripts/train_distilrm.sh"


@pytest.fixture
def launch(tmp_path):
    """launch(*arguments, **environment) -> the launcher's own arguments, and those of the training."""
    for name, body in {
        "deepspeed": 'printf "%s\\n" "$@"',
        "python": f'if [[ "$*" == *device_count* ]]; then echo "${{GPUS:-4}}"; else exec {sys.executable} "$@"; fi',
    }.items():
        file = tmp_path / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[list[str], list[str]]:
        kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NUM_PROCESSES", "ZERO")}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(SCRIPT), *arguments]
        done = subprocess.run(command, env=kept | {"PATH": path} | environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        words = done.stdout.splitlines()
        module = words.index("RewardTrainer.train.run_reward_train")
        return words[:module], words[module + 1 :]

    return run


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_every_gpu_gets_a_process_unless_the_number_is_given(launch):
    assert after(launch()[0], "--num_accelerators") == "4"
    assert after(launch(NUM_PROCESSES="3")[0], "--num_accelerators") == "3"
    assert after(launch(GPUS="0")[0], "--num_accelerators") == "1"
    assert after(launch(GPUS="0", NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")[0], "--num_accelerators") == "2"


def test_chosen_gpus_are_the_ones_that_train(launch):
    own, _ = launch(CUDA_VISIBLE_DEVICES="5,2,7,3", NUM_PROCESSES="2")
    assert after(own, "--include") == "localhost:5,2" and "--num_accelerators" not in own
    assert after(launch(CUDA_VISIBLE_DEVICES="6", GPUS="1")[0], "--include") == "localhost:6"
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES=GPU-1b2c: .* wants numbers"):
        launch(CUDA_VISIBLE_DEVICES="GPU-1b2c")


def test_what_the_command_line_or_the_recipe_says_comes_before_the_defaults(launch, tmp_path):
    _, words = launch("--run_name", "my --config --deepspeed run")
    assert after(words, "--config") == "configs/train/example.yaml"
    assert after(words, "--deepspeed") == "configs/deepspeed/zero2.json"
    assert after(launch(ZERO="3")[1], "--deepspeed") == "configs/deepspeed/zero3.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1.0e-4\ndeepspeed: mine.json\n")
    for given in (["--config", str(recipe)], [f"--config={recipe}"]):
        assert launch(*given)[1] == given  # the recipe's own DeepSpeed file
    assert launch("--deepspeed=other.json")[1] == ["--config", "configs/train/example.yaml", "--deepspeed=other.json"]


def test_an_unknown_zero_stage_is_refused_with_those_there_are(launch):
    with pytest.raises(RuntimeError, match="ZERO=5: not one of 1, 2, 3, 2_offload, 3_offload"):
        launch(ZERO="5")


def test_help_has_the_variables_first_then_our_own_flags_and_defaults_of_no_recipe():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    places = [done.stdout.index(words) for words in ("NUM_PROCESSES ", "--model_name_or_path", "--loss_type {bt,")]
    assert places == sorted(places) and places[-1] < done.stdout.index(
        "--learning_rate: Peak learning rate. (default: 1e-05)"
    )
    assert "Margins are divided by it. (default: 1.0)" in done.stdout and len(done.stdout.splitlines()) < 200
    named = set(re.findall(r"[a-z0-9_]{2,}", done.stdout))
    assert {each.name for each in fields(DistilConfig) if each.init} - NO_PLACE.keys() <= named


def test_several_nodes_are_those_of_the_hostfile(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    from deepspeed.launcher import runner

    hosts = tmp_path / "hosts.txt"
    hosts.write_text("one slots=4\ntwo slots=4\n")
    for given, slots in (({}, [0, 1, 2, 3]), ({"NUM_PROCESSES": "2", "MASTER_PORT": "29511"}, [0, 1])):
        own, words = launch("--learning_rate", "1e-4", HOSTFILE=str(hosts), CUDA_VISIBLE_DEVICES="", **given)
        read = runner.parse_args([*own, "RewardTrainer.train.run_reward_train", *words])
        assert (read.user_script, read.user_args) == ("RewardTrainer.train.run_reward_train", words)
        assert read.module and read.no_local_rank and read.master_port == int(given.get("MASTER_PORT", 29500))
        nodes = runner.parse_inclusion_exclusion(runner.fetch_hostfile(read.hostfile), read.include, read.exclude)
        nodes = runner.apply_num_nodes_and_gpus(nodes, read.num_nodes, read.num_gpus)
        assert {host: list(range(n)) if isinstance(n, int) else n for host, n in nodes.items()} == {
            "one": slots,
            "two": slots,
        }
