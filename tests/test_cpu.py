"""Threads are as many as the cores that this process may use, or that are idle."""

import os
import subprocess
import sys

import pytest

from distiller import cpu

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6), ("", 6)]
)
def test_cores_are_those_of_the_affinity_and_of_the_containers_share(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(cpu, "QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    assert cpu.usable_cores() == cores


def test_a_core_that_another_process_uses_is_not_idle(monkeypatch):
    core = max(os.sched_getaffinity(0))
    spinning = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spinning])
    try:
        busy = cpu.idle_cores(2.0)
    finally:
        process.kill()
        process.wait()
    assert 1 <= busy <= max(1, len(os.sched_getaffinity(0)) - 1)
