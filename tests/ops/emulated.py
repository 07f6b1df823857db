"""The CUDA kernels as plain C++ on the CPU (tests/ops/emulated_cuda), behind the launchers that GPUs use."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastdiff.ops import cuda

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "emulated_cuda"
FLAGS = ("-O1", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
SOURCES = (*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/bind_cuda.cpp")

H100 = (132, 232448, 233472, 8)
A100 = (108, 166912, 167936, 1)
ADA = (76, 101376, 102400, 1)
# few processors and little shared memory: small tensors then take the ways of large ones
SMALL = (8, 24000, 26000, 8)


def compile_all(sources: Sequence[Path], folder: Path, *flags: str, waiting: int = 2) -> list[Path]:
    """Compile with g++, `waiting` at a time; the objects."""
    import pybind11

    include = [f"-I{FAKE}", *(f"-isystem{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"]))]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, out: Path) -> None:
        # what binds the kernels computes nothing, and is the longest to compile
        own = [*FLAGS, *flags, *(["-O0"] if source.stem == "bind_cuda" else [])]
        command = ["g++", "-c", *own, "-Wno-unknown-pragmas", "-DFASTDIFF_EMULATED", *include]
        subprocess.run([*command, "-x", "c++", str(source), "-o", str(out)], check=True)

    with ThreadPoolExecutor(waiting) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


def link(objects: Sequence[Path], folder: Path, name: str, *, load: bool = True) -> Any:
    """The Python module `name` made of these objects."""
    library = folder / f"{name}.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(library)], check=True)
    return imported(library, name) if load else None


def environment(library: Path) -> dict[str, str]:
    """For a test run on this library instead of a freshly compiled one."""
    return os.environ | {"FASTDIFF_EMULATED_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}


def given() -> Any:
    """The library that `environment` names, None without."""
    library = os.environ.get("FASTDIFF_EMULATED_LIBRARY")
    return imported(Path(library), "_cuda") if library else None


def imported(library: Path, name: str) -> Any:
    """A compiled module by its path."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def on_the_cpu(kernels: Any, device: Sequence[int] = H100) -> Iterator[None]:
    """The launchers take CPU tensors, and plan for `device`: processors, shared bytes a block and a processor,
    largest cluster.
    """
    before = cuda.kernels, cuda.queue, cuda.device
    emulated = kernels.Device(*device)
    cuda.kernels, cuda.queue, cuda.device = kernels, lambda _: (0, 0), lambda _: emulated  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda.kernels, cuda.queue, cuda.device = before  # type: ignore[assignment]
