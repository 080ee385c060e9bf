"""Starting, watching and killing the processes of commands and servers under test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINUTE = 60.0
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "NO_PROXY": "127.0.0.1",
}


def under(root: int, name: str) -> list[int]:
    """Ids of the processes below `root` whose command line begins with `name`."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listing.splitlines()[1:])
    table = {int(pid): (int(parent), args) for pid, parent, args in rows}

    def below(pid: int) -> bool:
        while pid in table and pid != root:
            pid = table[pid][0]
        return pid == root

    return sorted(pid for pid, (_, args) in table.items() if args.startswith(name) and below(pid))


def kill_one(name: str) -> Callable[[int], None]:
    """Kills the first process below the one given whose command line begins with `name`."""
    return lambda root: os.kill(under(root, name)[0], signal.SIGKILL)


def run_and_kill(
    command: list[str], output: Path, kill: Callable[[int], None], environment: dict, rows: int = 5
) -> tuple[int, str]:
    """Start the command, call `kill(its process id)` once so many rows are on disk, and give it a minute to end: (exit
    code, what it said on stderr)."""
    log = Path(f"{output}.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file, start_new_session=True)
    try:
        while not output.exists() or output.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, f"ended before it could be killed:\n{log.read_text()[-4000:]}"
            time.sleep(0.02)
        kill(process.pid)
        return process.wait(timeout=MINUTE), log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def vllm_server(model: str | Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real vLLM server on loopback, ready: (base_url, its process, which leads a group of its own)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    # By default a server asks for 92 % of the memory, which a busy machine has not.
    command += ["--no-enable-chunked-prefill", "--gpu-memory-utilization", "0.4", *flags]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, "the server did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
