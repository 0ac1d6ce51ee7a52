"""Kernels in processes that were forked: before torch's threads have worked, and after."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Exit status: of the child, which SIGALRM ends if it waits for threads that it has not.
SCRIPT = """
import os, signal, sys
import torch
from adpdm import _native
torch.set_num_threads(2)
x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
scale, zero_point = torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32)
group = torch.zeros(1, dtype=torch.int32)
codes = lambda: torch.ops.adpdm.quantize(x, scale, zero_point, group, 8).numpy().tobytes()
torch.set_num_threads(1)
wanted = codes()
torch.set_num_threads(2)
threads = int(sys.argv[1])
if threads == 1:
    assert codes() == wanted
    assert _native.worker_threads() == 2
child = os.fork()
if child == 0:
    signal.alarm(60)
    as_before = codes() == wanted and _native.worker_threads() == threads
    os._exit(0 if as_before else 1)
_, status = os.waitpid(child, 0)
after = codes() == wanted and _native.worker_threads() == 2
sys.exit(0 if status == 0 and after else f"status {status}, after {after}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("threads", [2, 1], ids=["before", "after"])
def test_kernels_run_in_a_forked_process(threads: int) -> None:
    """On all threads if the parent had used none; on one otherwise: GNU's OpenMP would wait for ever."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
