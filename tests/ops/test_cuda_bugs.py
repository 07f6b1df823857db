"""Bugs planted into the CUDA kernels: each makes some check of test_cuda.py fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import emulated

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulated kernels"),
]

GN = ("group_norm.cu", "group_norm_backward.cu")
# file, what stands there, what the bug makes of it, sources to compile again where the file is a header
BUGS = {
    "other half of the guidance": ("step.cu", "read(n + call.images, c, p, count, u)", "read(n, c, p, count, u)"),
    "one history slot": ("step.cu", "call.h, FLOAT32, b * slot + i", "call.h, FLOAT32, i"),
    "this row's C_IN": ("step.cu", "r[COLUMNS + C_IN]", "r[C_IN]"),
    "variance of the first channels": ("step.cu", "read(n, c + space.channels,", "read(n, c,"),
    "NaN becomes the bound": ("step.cu", "max_nan(min_nan(v, bound), -bound)", "fmaxf(fminf(v, bound), -bound)"),
    "stream of x_T": ("step.cu", "STREAM_STEP}", "STREAM_X_T}"),
    "zero times NaN": ("step.cu", "    if (coefficient == 0) return;\n", ""),
    "history written for every row": ("step.cu", "if (r[P] == 0 && r[Q] == 0) return;", ""),
    "mask the other way": ("q_sample.cu", "!static_cast<const uint8_t*>", "static_cast<const uint8_t*>"),
    "sign of v": ("q_sample.cu", "alpha * z[j] - sigma", "alpha * z[j] + sigma"),
    "next image's time": ("q_sample.cu", "2 * call.t[n]", "2 * call.t[(n + 1) % call.images]"),
    "tail one short": ("elementwise.cuh", "(int)left : WIDTH", "(int)left - 1 : WIDTH", "q_sample.cu", "step.cu"),
    "one block for both halves": ("noise.cuh", "block + half", "block", "q_sample.cu"),
    "pairs exchanged": ("noise.cuh", "box_muller(w.c[0], w.c[1]", "box_muller(w.c[1], w.c[0]", "q_sample.cu"),
    "no pivot": ("group_norm.cu", "pivot[w] = v[w]", "pivot[w] = 0"),
    "no exchange in a cluster": ("group_norm.cu", "order\n    cluster_sync();", "order\n    __syncthreads();"),
    "every rank is the first": ("group_norm.cu", "cluster_read(means + thread, r)", "cluster_read(means + thread, 0)"),
    "add left out": ("group_norm.cu", "exact_sum(p.x, at(call.add, n, c, 0))", "exact_sum(p.x, 0)"),
    "unmerged means": ("group_norm.cuh", "+ delta * delta * share * a.n", "", *GN),
    "mean without its remainder": ("group_norm.cuh", "float rest = s.rest + lo", "float rest = s.rest", *GN),
    "first image's numbers": ("group_norm.cuh", "v.data[n * v.image + c]", "v.data[c]", *GN),
    "first half of the lanes": ("group_norm.cuh", "lane < plan.lanes; lane +=", "lane < plan.lanes / 2; lane +=", *GN),
    "x2 beside its start": ("group_norm.cuh", "c = place.channel - from,", "c = place.channel - from - !!from,", *GN),
    "slope of the sigmoid": ("group_norm.cuh", "fused(n, 1 - s, 1.0f)", "fused(n, s, 1.0f)", *GN),
    "means exchanged": ("group_norm_slopes.cuh", "c.r * c.r * c2, c.r", "c.r * c.r * c1, c.r", GN[1]),
    "mean over pixels only": ("group_norm_backward.cu", "1 / ((float)call.pixels * size)", "1 / (float)call.pixels"),
    "xhat about M": ("group_norm_slopes.cuh", "fused(c.r, s2, c.d * s1)", "c.r * s2", GN[1]),
    "residual in front of the SiLU": (
        "group_norm.cu",
        "scaled<V>(call, mine, v);\n            R::add(raw.residual, v);",
        "R::add(raw.residual, v);\n            scaled<V>(call, mine, v);",
    ),
    "residual of x's dtype": ("residual.cuh", "call.residual_dtype == FLOAT32", "false", GN[0]),
    "residual of the first image": (
        "group_norm.cu",
        "call.residual_dtype, out(j))",
        "call.residual_dtype, out(j) - place.n * call.channels * call.pixels)",
    ),
    "sums of a split": ("group_norm_backward.cu", "split < norm.plan.splits", "split < 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    pytest.importorskip("pybind11", reason="pybind11 binds the emulated kernels")
    folder = tmp_path_factory.mktemp("right")
    return {path.stem: path for path in emulated.compile_all(emulated.SOURCES, folder)}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(objects, bug, tmp_path):
    file, right, wrong, *sources = BUGS[bug]
    shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda" / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    again = [tmp_path / "csrc/cuda" / name for name in sources or (file,)]
    fresh = {path.stem: path for path in emulated.compile_all(again, tmp_path, "-Wno-error", "-w")}
    emulated.link([*(objects | fresh).values()], tmp_path, "_cuda", load=False)
    # in a process of its own: a bug may do anything
    tests = Path(__file__).parent / "test_cuda.py"
    chosen = "not offsets and not quotients and not bytes and not plans and not every_way"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen, str(tests)]
    environment = emulated.environment(tmp_path / "_cuda.so")
    done = subprocess.run(command, env=environment, cwd=emulated.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 2, 4, 5), done.stdout
