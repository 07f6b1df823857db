"""What is installed, what runs here and why the rest does not: `fastdiff doctor`, `fd.doctor()`.

It uses nothing of `fastdiff/__init__.py`, so that it still speaks where another package has overwritten that file.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fastdiff._version import __version__

_PACKAGE = Path(__file__).parent

REINSTALL = "pip uninstall -y fastdiff fastdiff-engine, then install fastdiff-engine again"

FIXES = {
    "cpp": "install a C++ compiler (apt install g++) and reinstall fastdiff-engine; pip install -v shows the build",
    "triton": "needs Linux, a CUDA GPU, a CUDA build of torch and `pip install triton`",
    "cuda": "needs nvcc and a CUDA GPU at install time: FASTDIFF_CUDA=1 pip install --force-reinstall --no-deps .",
}
"""What to do when a backend has a kernel and cannot run it."""


def doctor() -> int:
    """Print versions, devices, compilers, threads and every op on every backend. Returns 1 on a clash, else 0.

    A clash is the other PyPI project named `fastdiff` in the same environment: both own the folder `fastdiff/`.
    """
    clash = _clash()
    for name, text in _versions():
        print(f"{name:12s}{text}")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        print(f"\ntorch cannot be imported ({error}): pip install torch")
    else:
        _print_machine()
        _print_ops()
    if clash:
        print(f"\nclash       {clash}; fix: {REINSTALL}")
    return 1 if clash else 0


def _print_machine() -> None:
    print()
    for rows in (_devices(), _compilers(), _threads(), _environment()):
        for name, text in rows:
            print(f"{name:12s}{text}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[tuple[str, str]]:
    installed = _version("fastdiff-engine") or "not installed: this is a source tree"
    yield "fastdiff", f"{__version__} in {_PACKAGE} (fastdiff-engine {installed})"
    yield "python", platform.python_version()
    for name in ("torch", "triton", "numpy", "safetensors", "pillow", "tqdm", "tyro"):
        yield name, _version(name) or f"not installed: pip install {name}"


def _clash() -> str | None:
    """A sentence when the other project named `fastdiff` is or was installed over this one; None when all is well."""
    other = _version("fastdiff")
    if other is not None:
        return f"another distribution named fastdiff ({other}) is installed and shares our import name"
    try:
        files = importlib.metadata.files("fastdiff-engine") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix() != "fastdiff/__init__.py" or not file.hash or path.parent != _PACKAGE:
            continue
        digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            return f"{path} is not the file that fastdiff-engine installed: another package has overwritten it"
    return None


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    cpu = "unknown"
    if Path("/proc/cpuinfo").is_file():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    yield "cpu", f"{cpu}, {os.cpu_count()} logical cores, {platform.machine()}, ISA {_isa()}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            yield f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    elif torch.version.cuda is None:
        yield "cuda", "none: this torch is a CPU build; a GPU needs a CUDA build of torch (pytorch.org)"
    else:
        yield "cuda", f"none: torch was built for CUDA {torch.version.cuda} but sees no GPU or no driver (nvidia-smi)"


def _isa() -> str:
    """The instruction set that the compiled CPU part picked at import, or why there is none."""
    try:
        native = importlib.import_module("fastdiff.ops.native")
    except ImportError as error:
        return f"none: {error}"
    return str(native.isa() or f"none: {native.missing()}")


def _compilers() -> Iterator[tuple[str, str]]:
    for name, candidates in (("C++", (os.environ.get("CXX", "c++"), "g++", "clang++")), ("nvcc", ("nvcc",))):
        found = next((path for c in candidates if (path := shutil.which(c))), None)
        yield name, f"{found}: {_first_line(found, name == 'nvcc')}" if found else "none found on PATH"


def _first_line(program: str, last: bool) -> str:
    """What `program --version` says first (nvcc says it last)."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    lines = done.stdout.strip().splitlines() or [f"--version prints nothing, exit code {done.returncode}"]
    return lines[-1 if last else 0]


def _threads() -> Iterator[tuple[str, str]]:
    import torch

    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS changes it)"
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        yield "OpenMP", "cannot be read on this system"
        return
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    pools = sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))
    if len(pools) < 2:
        yield "OpenMP", f"{pools[0] if pools else 'none'}, one pool shared with torch"
    else:
        yield "OpenMP", f"{len(pools)} pools that compete for the cores: {', '.join(pools)}; import torch first"


def _environment() -> Iterator[tuple[str, str]]:
    for name in sorted(os.environ):
        if name.startswith("FASTDIFF_"):
            yield "set", f"{name}={os.environ[name]}"


def _print_ops() -> None:
    from fastdiff import ops as folder
    from fastdiff.ops import dispatch

    # an op is registered when its module is imported; kernels (<op>_<backend>) are imported when they are asked for
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.endswith(tuple(f"_{name}" for name in dispatch.BACKENDS)):
            try:
                importlib.import_module(f"fastdiff.ops.{module.name}")
            except ImportError as error:
                print(f"{module.name} does not load: {error}")
    stuck = set()
    for op in dispatch.ops():
        print()
        for name in dispatch.BACKENDS:
            reason = dispatch.reason(op, name)
            print(f"{op:17s}{name:11s}{dispatch.state(op, name).removeprefix(op + ' ')}")
            if reason is not None and not reason.endswith("kernel yet"):
                stuck.add(name)
    print()
    for name in sorted(stuck):
        print(f"{name:12s}fix: {FIXES[name]}")
