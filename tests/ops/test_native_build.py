"""Between Python and the compiled kernels: one OpenMP, no GIL, the same bits on every ISA, and life without them."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastdiff import row
from fastdiff.ops import dispatch, native, step_
from fastdiff.ops.step_cpp import run as step_cpp_
from tests.ops.cases import Case, inputs, run
from tests.process import python

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp"))
needs_kernels = pytest.mark.skipif(native.cpu is None, reason=str(native.missing()))


def output(code, **given):
    done = python("-c", code, **given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_kernels
def test_columns_and_dtypes_are_those_of_python():
    assert tuple(native.cpu.columns.split(", ")) == row.NAMES
    header = (ROOT / "csrc/cpu/kernels.h").read_text()
    names = re.search(r"enum Dtype : int \{ (.*?) \}", header)[1].lower().split(", ")
    assert {getattr(torch, name): i for i, name in enumerate(names)} == native.DTYPES


@needs_kernels
def test_torch_and_the_kernels_share_one_pool_of_threads():
    """/proc counts threads: none beside the first with one thread, and torch wakes the pool that the kernel started."""
    code = """
import os, torch
from fastdiff.ops import native
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
out, seed, index = torch.empty(64, 65536), torch.tensor([1]), torch.arange(64)
def count(threads, torch_too=False):
    torch.set_num_threads(threads)
    native.cpu.normal(out.data_ptr(), seed.data_ptr(), index.data_ptr(), 0, 0, 64, 65536, torch.get_num_threads())
    if torch_too:
        out.add_(1)
    return len(os.listdir("/proc/self/task"))
before = len(os.listdir("/proc/self/task"))
print(len(maps), count(1) - before, count(3) - before, count(3, True) - before)
"""
    assert output(code).split() == ["1", "0", "2", "2"]


@needs_kernels
def test_another_python_thread_runs_meanwhile():
    """No thread is asked to give up the GIL here, so the other one moves only where a kernel released it."""
    out, seed, index = torch.empty(8, 1 << 19), torch.tensor([1]), torch.arange(8)
    turns, stop, interval = [0], threading.Event(), sys.getswitchinterval()

    def spin():
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)

    moved = 0
    other = threading.Thread(target=spin)
    sys.setswitchinterval(1000)
    try:
        other.start()
        for _ in range(50):
            before = turns[0]
            native.cpu.normal(out.data_ptr(), seed.data_ptr(), index.data_ptr(), 0, 0, 8, 1 << 19, 1)
            moved += turns[0] - before
            if moved:
                break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    assert moved > 0


SAME_BITS = """
import hashlib, torch
from fastdiff.ops import native, normal, q_sample, step_, dispatch, time_embed_cpp
from tests.ops.cases import CASES, Case, inputs, run
total = hashlib.sha256()
def add(*tensors):
    for x in tensors:
        total.update(x.contiguous().view(torch.uint8).numpy().tobytes())
with dispatch.backend("cpp"):
    pixels = [Case((2, c, 23, 29), channels_last=True, dtype=d, variance=v, columns=("A", "B0", "S", "Q"))
              for c in (1, 3, 4, 5, 16) for d in (torch.float32, torch.float16) for v in (None, "range")]
    for case in (*CASES.values(), *pixels):
        got = run(step_, inputs(case))
        if got["x"].numel():
            add(got["x"], got["x_in"], got["h"].nan_to_num())
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        x0 = torch.randint(0, 200, (5, 3, 37, 41), generator=g).to(dtype)
        table = torch.rand(5, 2, generator=g)
        at = dict(seed=torch.tensor([-3]), index=torch.arange(5) << 31, step=(1 << 24) - 1, stream=255)
        add(*q_sample(x0, torch.arange(5), table, **at, eps=True, v=True))
        add(q_sample(x0, torch.arange(5), table, **at, where=x0[:1, :1] > 0))
    add(normal(at["seed"], at["index"], 3, 0, (3, 131, 7)))
for scale in (1.0, 1e3, 1e9):
    add(time_embed_cpp.run(torch.arange(0, 1000, 37), 321, scale=scale))
print(native.isa(), total.hexdigest())
"""


@needs_kernels
def test_every_isa_gives_the_same_bits():
    assert native.isa() in native.cpu.isas
    # behind the package under test, for what the tests share
    code = f"import sys; sys.path.append({str(ROOT)!r})" + SAME_BITS
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda name: output(code, FASTDIFF_ISA=name).split(), native.cpu.isas))
    assert [line[0] for line in lines] == list(native.cpu.isas)
    assert len({line[1] for line in lines}) == 1


@needs_kernels
@pytest.mark.parametrize("module", ["fastdiff._cpu", "fastdiff.ops.native"])
def test_an_isa_that_is_none(module):
    done = python("-c", f"import {module}", FASTDIFF_ISA="v9")
    assert done.returncode == 1
    assert "ImportError: FASTDIFF_ISA=v9 is unknown to this build; accepted here: " in done.stderr


@needs_kernels
def test_numbers_that_would_leave_the_buffers():
    args = inputs(Case(columns=("A", "B0", "Q")))
    first = [args[k] for k in ("x", "x_in", "h", "F", "rows", "k", "index", "seed")]
    with pytest.raises(ValueError, match="k=6 is outside the 7 lines"):
        step_cpp_(*first[:5], torch.tensor([6]), *first[6:])
    # shapes are the op's to check, in front of every backend
    with dispatch.backend("cpp"), pytest.raises(ValueError, match="index must be"):
        step_(*first[:6], args["index"][:2], args["seed"])
    args["rows"][:, row.SLOT] = 3
    with pytest.raises(ValueError, match="SLOT 3"):
        step_cpp_(*first)


def test_strides_that_kernels_can_follow():
    dense = torch.zeros(2, 3, 4, 5)
    assert native.strided(dense)[2:] == (60, 20, 1)
    assert native.strided(dense.to(memory_format=torch.channels_last))[2:] == (60, 1, 3)
    assert native.strided(torch.zeros(2, 8, 4, 5)[:, 2:5])[2:] == (160, 20, 1)
    assert native.strided(dense.transpose(2, 3)) is None
    assert native.strided(dense[..., :4]) is None
    assert native.strided(dense[:, :, :1])[4] == 1
    assert native.strided(torch.zeros(2, 3))[2:] == (3, 1, 1)
    assert native.strided(torch.zeros(2, 3, 0, 4)) is not None
    assert native.strided(torch.zeros(0, 3, 4, 5).transpose(2, 3)) is not None


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    wanted = run(step_cpp_, inputs(Case((7, 3, 33, 31), columns=("A", "B0", "S", "Q"))))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run(step_cpp_, inputs(Case((7, 3, 33, 31), columns=("A", "B0", "S", "Q"))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[k].nan_to_num(), wanted[k].nan_to_num()) for k in ("x", "x_in", "h"))


def test_sources_know_neither_torch_nor_inline_library_code():
    """Vector sources are compiled once per ISA; a shared inline function could be linked in its AVX-512 form."""
    for source in SOURCES:
        included = set(re.findall(r"#include <(.*?)>", source.read_text()))
        assert not [name for name in included if re.match(r"torch|ATen|c10", name)], source
        if source.parent.name == "cpu" or source.name == "philox.h":
            assert included <= {"stdint.h", "stddef.h", "immintrin.h"}, source


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64 cross compiler")
def test_sources_compile_for_aarch64():
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        command = "aarch64-linux-gnu-g++ -std=c++17 -fopenmp -Wall -Wextra -Werror -DFASTDIFF_ISA_NS=base -fsyntax-only"
        done = subprocess.run([*command.split(), str(source)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def checkout(tmp_path):
    """The sources alone, without compiled files."""
    for needed in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(needed, reason=f"{needed} builds the kernels")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastdiff"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(folder, **variables):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("cxx", "says"), [("/no/such/compiler", "no C++ compiler"), ("false", "compiler failed")])
def test_without_a_compiler_the_package_works(checkout, cxx, says):
    done = build(checkout, CXX=cxx, FASTDIFF_REQUIRE_CPP="")
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    assert "runs on its PyTorch reference" in done.stderr
    assert build(checkout, CXX=cxx, FASTDIFF_REQUIRE_CPP="1").returncode != 0
    if cxx == "false":
        return
    code = """
import torch
from fastdiff.ops import dispatch, q_sample
x0, t, table = torch.ones(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.ones(1, 2)
print(q_sample(x0, t, table, noise=x0).sum().item(), dispatch.reason("q_sample", "cpp"))
"""
    assert re.match(r"16\.0 fastdiff\._cpu was not built .* install g\+\+", output(code, home=checkout))


@needs_kernels
def test_why_names_the_choice():
    x0, t, table = torch.ones(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.ones(1, 2)
    lines = dict(line.split(maxsplit=1) for line in dispatch.why("q_sample", x0, t, table, noise=None).splitlines())
    assert lines["cpp"] == "runs, taken by auto"
    assert "takes float32" in dispatch.reason("q_sample", "cpp", x0.double(), t, table)
