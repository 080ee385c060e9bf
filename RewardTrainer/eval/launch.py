"""One process a GPU: the same command again in several processes, each with its own share of the rows and of the
GPUs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time

from distiller.records import InputError

SHARD = "EVAL_SHARD"
"""Environment variable that tells a child `number/processes`."""
PARENT = "EVAL_PARENT"
"""Environment variable that tells a child the process id of the command that started it."""


def shard_of_this_process() -> tuple[int, int] | None:
    """(number, processes) in a child, None in the command the user started."""
    text = os.environ.get(SHARD)
    if not text:
        return None
    number, _, processes = text.partition("/")
    return int(number), int(processes)


def end_with_parent() -> None:
    """End this child when the command that started it is gone, killed even: nobody would take up what it scores, and
    its lock would keep the same command from going on. To be called first, before a model is loaded."""
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def count_processes(asked: int | None, gpus_each: int) -> int:
    """As many as asked for, or one for each `gpus_each` GPUs, or one. Raises InputError for a number under 1."""
    if asked is not None:
        if asked < 1:
            raise InputError(f"--num_processes {asked}: at least 1")
        return asked
    import torch

    return max(1, torch.cuda.device_count() // gpus_each)


def run_processes(module: str, arguments: object, processes: int, gpus_each: int) -> None:
    """Run a module once for each share, and wait. When one fails the others are stopped.

    Args:
        module: to run with `python -m`
        arguments: dataclass of its command-line arguments
        processes, gpus_each: how many, and GPUs of each

    Raises:
        InputError: a process failed; what it said is on stderr
    """
    import torch

    gpus = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = visible or [str(number) for number in range(gpus)]
    if gpus and processes * gpus_each > gpus:
        raise InputError(f"{processes} processes of {gpus_each} GPUs each, and {gpus} GPUs are there")
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    command = [sys.executable, "-m", module, *command_line(arguments)]
    children: list[subprocess.Popen] = []
    try:
        for number in range(processes):
            environment = os.environ | {SHARD: f"{number}/{processes}", PARENT: str(os.getpid())}
            if gpus:
                mine = visible[number * gpus_each : (number + 1) * gpus_each]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            else:
                environment.setdefault("OMP_NUM_THREADS", threads)
            children.append(subprocess.Popen(command, env=environment))
        while any(child.poll() is None for child in children):
            if any(child.returncode for child in children):
                break
            time.sleep(0.1)
        failed = [number for number, child in enumerate(children) if child.returncode]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
    if failed:
        raise InputError(
            f"process {failed[0]} of {processes} failed (exit code {children[failed[0]].returncode}); the same "
            "command goes on with what is done"
        )


def command_line(arguments: object) -> list[str]:
    """A dataclass of arguments as flags that give the same values."""
    flags = []
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if field.init and isinstance(value, list):
            flags += [f"--{field.name}", *map(str, value)]
        elif field.init and value is not None:
            flags.append(f"--{field.name}={value}")
    return flags
