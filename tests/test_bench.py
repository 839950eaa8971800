"""The benchmark for GPUs is rarely run where one is: this keeps the script itself working."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.mark.engine
@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_through_on_a_cpu() -> None:
    command = [sys.executable, BENCH / "gpu.py", "--rehearse", "--times", "1", "--tokens", "8"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for part in ("test_cuda.py", "drawing, tokens/s", "an inner step", "a click", "32 together, 16 adapters"):
        assert part in found.stdout


@pytest.mark.engine
def test_the_benchmark_leaves_out_what_there_is_no_time_for() -> None:
    command = [sys.executable, BENCH / "gpu.py", "--rehearse", "--minutes", "0"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("left out: no time") == 4
