"""Building `fastdiff._cuda`: it needs nvcc and no GPU, and never fails an install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import python

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """The sources without compiled files, and without those of the CPU kernels, which are not looked at here."""
    for needed in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(needed, reason=f"{needed} builds the kernels")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastdiff"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "bind_cpu.cpp")
        )
    return tmp_path


def build(folder, **variables):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"FASTDIFF_CUDA": "1", "FASTDIFF_REQUIRE_CPP": ""} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def test_without_nvcc_it_says_so(checkout):
    path = checkout / "bin"
    path.mkdir()
    done = build(checkout, PATH=f"{path}", CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "FASTDIFF_CUDA=1, but no nvcc on PATH: fastdiff._cuda is not built" in done.stderr


def test_an_nvcc_that_fails_stops_no_install(checkout):
    path = checkout / "bin"
    path.mkdir()
    program(path, "nvcc", "#!/bin/sh\necho no CUDA today >&2\nexit 1\n")
    (checkout / "csrc/bind_cuda.cpp").write_text("")
    done = build(checkout, PATH=f"{path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "no CUDA today" in done.stdout + done.stderr
    assert 'building extension "fastdiff._cuda" failed' in done.stdout + done.stderr
    assert not list((checkout / "fastdiff").glob("_cuda*.so"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_it_builds_and_loads_without_a_gpu(checkout):
    """For one device only; the default is two."""
    done = build(checkout, FASTDIFF_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stderr
    assert "warning #" not in done.stdout + done.stderr
    code = """
import torch
from fastdiff.ops import cuda
print(cuda.kernels.__name__, cuda.missing())
if not torch.cuda.is_available():
    try:
        cuda.kernels.normal(0, 0, 0, 0, 0, 1, 8, 0, 0)
    except RuntimeError as error:
        print(error)
"""
    done = python("-c", code, home=checkout)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("fastdiff._cuda ")
    assert not rest or (first.endswith("torch sees no GPU here") and "CUDA kernels: cudaSetDevice: " in rest[0])
