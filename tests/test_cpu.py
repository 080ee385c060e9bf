"""Threads are as many as the cores that this process may use, or that are idle."""

import os

import psutil
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


def test_cores_that_others_use_are_not_idle(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    monkeypatch.setattr(cpu, "usable_cores", lambda: 4)
    for busy, idle in (([0.0] * 6, 4), ([100.0, 0, 100, 100, 90, 0], 2), ([100.0] * 6, 1), ([0.0] * 5, 4)):
        monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu, busy=busy: busy)
        assert cpu.idle_cores() == idle
