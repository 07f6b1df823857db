"""Builds the compiled kernels: ninja over plain C++, no torch, no CMake. The rest of the package is in pyproject.toml.

Environment: CXX, CXXFLAGS, LDFLAGS as usual. FASTDIFF_REQUIRE_CPP=1 makes a failed build of the CPU kernels an error;
without it the package installs with its PyTorch reference. FASTDIFF_CUDA=1 builds CUDA kernels where no GPU is seen;
FASTDIFF_CUDA_ARCHS="80;90" says for which devices, the last one also as PTX for those that come after it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"),
    # one rounding an operation: noise and steps are the same bits on every ISA; NaN and inf stay what they are
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
WITHOUT = "Without it fastdiff runs on its PyTorch reference and Triton; FASTDIFF_REQUIRE_CPP=1 makes this an error."
# clusters and cudaLaunchKernelEx need CUDA 12; sums and products are rounded one by one, as the reference's are
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "--fmad=false", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-DNDEBUG"),
]
ISAS = {"v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "v3": ["-march=x86-64-v3"], "base": ["-march=x86-64"]}


class Object(NamedTuple):
    source: Path
    stem: str
    flags: list[str]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def accepts(flags: list[str]) -> bool:
    command = [*compiler(), *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def isas() -> dict[str, list[str]]:
    """The instruction sets that vector sources are compiled for: three on x86-64, the default one elsewhere."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"base": []}
    return {name: flags for name, flags in ISAS.items() if name == "base" or accepts(flags)}


def cpu_objects() -> list[Object]:
    import pybind11

    found = isas()
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    have = [f"-DFASTDIFF_HAVE_{name.upper()}" for name in found]
    binding = Object(CSRC / "bind_cpu.cpp", "bind_cpu", [*includes, *have])
    return [binding] + [
        Object(source, f"{source.stem}.{name}", [*flags, f"-DFASTDIFF_ISA_NS={name}"])
        for source in sorted((CSRC / "cpu").glob("*.cpp"))
        for name, flags in found.items()
    ]


def cuda_objects() -> list[Object]:
    binding, *_ = cpu_objects()
    archs = os.environ.get("FASTDIFF_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [
        Object(CSRC / "bind_cuda.cpp", "bind_cuda", binding.flags),
        *(Object(source, source.stem, codes) for source in sorted((CSRC / "cuda").glob("*.cu"))),
    ]


def write_ninja(path: Path, target: Path, objects: list[Object]) -> None:
    from ninja import ninja_syntax

    def escaped(path: Path) -> str:
        return ninja_syntax.escape_path(str(path.resolve()))

    cxx, own = shlex.join(compiler()), os.environ.get("CXXFLAGS", "")
    with path.open("w") as file:
        ninja = ninja_syntax.Writer(file, width=100000)
        ninja.rule("compile", f"{cxx} -MMD -MF $out.d {own} {shlex.join(FLAGS)} $flags -c $in -o $out", "compile $out",
                   depfile="$out.d", deps="gcc")  # fmt: skip
        nvcc = f"nvcc -ccbin {shlex.quote(compiler()[0])} {shlex.join(NVCC_FLAGS)}"
        ninja.rule("nvcc", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out", "nvcc $out", depfile="$out.d", deps="gcc")
        cuda = any(item.source.suffix == ".cu" for item in objects)
        link = f"{nvcc} -shared $in -o $out" if cuda else f"{cxx} -shared $in -o $out -fopenmp"
        ninja.rule("link", f"{link} {os.environ.get('LDFLAGS', '')}", "link $out")
        outputs = []
        for item in objects:
            rule = "nvcc" if item.source.suffix == ".cu" else "compile"
            outputs += ninja.build(f"{item.stem}.o", rule, escaped(item.source),
                                   variables={"flags": shlex.join(item.flags)})  # fmt: skip
        ninja.build(escaped(target), "link", outputs)


def cuda_sources() -> list[str]:
    """The CUDA kernels, where nvcc is here and a GPU is seen or FASTDIFF_CUDA=1 asks for them."""
    asked = os.environ.get("FASTDIFF_CUDA") == "1"
    found = shutil.which("nvcc")
    if asked and not found:
        print("FASTDIFF_CUDA=1, but no nvcc on PATH: fastdiff._cuda is not built", file=sys.stderr)
    wanted = asked or Path("/dev/nvidia0").exists()
    return sorted(map(str, (CSRC / "cuda").glob("*.cu"))) if wanted and found else []


OBJECTS = {"fastdiff._cpu": cpu_objects, "fastdiff._cuda": cuda_objects}


def extensions() -> list[Extension]:
    headers = [str(path) for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh", ".cu")]
    required = os.environ.get("FASTDIFF_REQUIRE_CPP") == "1"
    cpu = ["csrc/bind_cpu.cpp", *sorted(map(str, (CSRC / "cpu").glob("*.cpp")))]
    found = [Extension("fastdiff._cpu", cpu, depends=headers, optional=not required)]
    if cuda := cuda_sources():
        found.append(Extension("fastdiff._cuda", ["csrc/bind_cuda.cpp", *cuda], depends=headers, optional=True))
    return found


class NinjaBuild(build_ext):
    """Raises CompileError only, which setuptools turns into a warning for an optional extension."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve() / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # a failed build must not pass off the library of an earlier one
        target.unlink(missing_ok=True)
        if shutil.which(compiler()[0]) is None:
            raise CompileError(f"no C++ compiler {compiler()[0]!r}; install g++ or set CXX. {WITHOUT}")
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_ninja(folder / "build.ninja", target, OBJECTS[ext.name]())
        except ImportError as error:
            raise CompileError(f"{error}; pip install pybind11 ninja. {WITHOUT}") from error
        done = subprocess.run([sys.executable, "-m", "ninja"], cwd=folder, check=False)
        if done.returncode:
            raise CompileError(f"ninja or the C++ compiler failed, see the message above. {WITHOUT}")


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
