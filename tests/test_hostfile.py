"""Training on several nodes: DeepSpeed's hostfile, pdsh, ssh. Both nodes are loopback addresses of this machine."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_launchers import free_port
from test_train_launch import SCRIPTS, flags, kill, logged
from train_fixtures import pair_rows, tiny_model, write_rows

from RewardTrainer.train import run_reward_train
from RewardTrainer.train.trainer import last_checkpoint

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
NODES = ("127.0.0.1", "127.0.0.2")
needs_ssh = pytest.mark.skipif(
    not (SSHD and shutil.which("pdsh") and os.getuid() == 0), reason="needs pdsh, openssh-server and root"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nodes")
    tiny_model(root / "student", tied=False)
    tiny_model(root / "teacher", hidden=48, seed=1)
    write_rows(root / "scored.jsonl", pair_rows(60))
    (root / "hosts.txt").write_text("# two nodes\n\n" + "".join(f"{node} slots=1\n" for node in NODES))
    return root


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """A PATH whose `ssh` reaches both nodes, by a server and keys of its own."""
    root, port = tmp_path_factory.mktemp("ssh"), free_port()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / key)], check=True)
    listen = "".join(f"ListenAddress {node}\n" for node in NODES)
    (root / "sshd_config").write_text(
        f"Port {port}\n{listen}HostKey {root}/host\nAuthorizedKeysFile {root}/user.pub\nStrictModes no\nPidFile none\n"
    )
    (root / "ssh_config").write_text(
        f"Host *\nPort {port}\nIdentityFile {root}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\n"
    )
    client = root / "bin/ssh"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {root}/ssh_config "$@"\n')
    client.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
    with (root / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(root / "sshd_config")], stderr=log)
    until = time.monotonic() + 30
    while subprocess.run([client, NODES[1], "true"], check=False, capture_output=True).returncode:
        assert server.poll() is None and time.monotonic() < until, (root / "log").read_text()
        time.sleep(0.1)
    yield f"{client.parent}{os.pathsep}{os.environ['PATH']}"
    server.terminate()
    server.wait()


def start(world: Path, ssh: str, output: Path, *extra: str) -> subprocess.Popen:
    variables = {"PATH": ssh, "HOSTFILE": str(world / "hosts.txt"), "MASTER_ADDR": NODES[0], "ZERO": "3"}
    variables |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            ["bash", str(SCRIPTS / "train_distilrm.sh"), *flags(world, output, batch_size=1), *extra],
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, output: Path) -> int:
    try:
        return process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        pytest.fail(output.with_suffix(".log").read_text(errors="replace")[-4000:])
    finally:
        if process.poll() is None:
            kill(process)


@needs_ssh
@pytest.mark.slow
def test_two_nodes_train_as_one_process_does_and_go_on_after_sigterm(world, ssh):
    run_reward_train.main(flags(world, world / "alone", batch_size=2))
    output, log = world / "nodes", world / "nodes.log"
    long = ["--save_strategy", "no"]  # nothing but the signal saves
    process = start(world, ssh, output, *long)
    while "'loss'" not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finish(process, output) == 143, log.read_text(errors="replace")[-4000:]
    assert last_checkpoint(output) and not (output / "model.safetensors").exists()
    ranks = [p for p in psutil.process_iter(["cmdline"]) if str(output) in (p.info["cmdline"] or [])]
    assert not ranks

    assert finish(start(world, ssh, output, *long, "--resume_from_checkpoint", "last"), output) == 0, log.read_text()
    said = log.read_text(errors="replace")
    assert "2 process(es), DEEPSPEED, ZeRO stage 3" in said and "starting from the beginning" not in said
    assert all(f"{node}: " in said for node in NODES)
    alone, both = logged(world / "alone"), logged(output)
    for one, two in zip(alone, both, strict=True):
        for term in ("loss", "loss_reward", "loss_sft", "loss_kl"):
            assert two[term] == pytest.approx(one[term], abs=1e-3), term
    ours, theirs = (load_file(path / "model.safetensors") for path in (output, world / "alone"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


def test_hostfile_that_is_not_there_is_refused(world):
    # DeepSpeed itself would train on this machine alone.
    done = subprocess.run(
        ["bash", str(SCRIPTS / "train_distilrm.sh")],
        env=os.environ | {"HOSTFILE": str(world / "absent.txt")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "absent.txt: no such file" in done.stderr
