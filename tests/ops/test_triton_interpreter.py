"""Triton's kernels on CPU tensors: TRITON_INTERPRET=1 must be set before triton is imported, so in another process."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from fastdiff.ops import jit
from tests.process import HOME, together

HERE = Path(__file__).parent
# what no kernel does on a GPU, or takes minutes here and is in interpreted_step.py at another size
LEFT_OUT = "times_outside_the_table or noise_does_not_depend_on_the_batch"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(jit.INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("marked", "least"), [("not slow", 420), pytest.param("slow", 75, marks=pytest.mark.slow)])
def test_every_kernel_in_the_interpreter(marked, least):
    """The interpreter's own tests and those of the ops on the backend triton, in two processes."""
    own = [str(path) for path in sorted(HERE.glob("interpreted_*.py"))]
    assert len(own) >= 6
    ops = [str(HERE / f"test_{op}.py") for op in ("philox", "q_sample", "step", "time_embed")]
    path = os.pathsep.join((str(HOME), str(HERE.parents[1])))
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", marked]
    command += ["-k", f"interpreted_ or (triton and not ({LEFT_OUT}))"]
    norm = [name for name in own if name.endswith("_group_norm.py")]
    halves = [[*norm, *ops], [name for name in own if name not in norm]]
    # what is slow is all in the second
    halves = halves[marked == "slow" :]
    total = 0
    for done in together(*(command + half for half in halves), seconds=880, TRITON_INTERPRET="1", PYTHONPATH=path):
        passed = re.search(r"(\d+) passed", done.stdout)
        assert passed is not None, done.stdout[-2000:] + done.stderr[-2000:]
        assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
        total += int(passed[1])
    assert total >= least
