"""DeepSpeed's step as the trainer leaves it is DeepSpeed's own, in norms, moments and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_launchers import free_port

DRIVER = Path(__file__).parent / "zero_step_driver.py"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "configurations"), [(2, "zero1,zero2"), (1, "single,zero2")])
def test_clipped_and_unclipped_steps_end_where_deepspeeds_own_do(ranks, configurations):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)),
            *("--master_port", str(free_port()), "--no_local_rank", str(DRIVER), configurations),
        ],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DRIVER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert len(found) == 2 * sum(3 if name == "zero1" else 4 for name in configurations.split(","))
    for name, steps in found.items():
        assert steps["lightened"], name
        assert steps["light_norms"] == pytest.approx(steps["norms"], rel=1e-5), name
        assert min(steps["norms"]) > steps["clip"] or max(steps["norms"]) < steps["clip"], name
        assert steps["apart"] < 1e-6, name
