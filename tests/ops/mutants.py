"""Kernels with a bug planted in their source, each judged on the cells: one that no cell notices has survived.

A C++ mutant is built by compiling the one file it touches, for one instruction set, and linking it with the others; a
Triton mutant is a copy of its module run in the interpreter. A process forks for each, so that the oracle's answers are
computed once and a crash ends nothing but its mutant. Two are compiled, and two judged, at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.ops import sweep
from tests.ops.describe import Known, known
from tests.ops.describe_all import DESCRIPTIONS, cells_of
from tests.ops.mutants_list import Mutant

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-O0", "-ffp-contract=off", "-fno-math-errno", "-w")


UNCHANGED = "unchanged"
TOGETHER = 2
"""Processes at a time: compilers first, then judges."""


class Judged(NamedTuple):
    mutant: str
    says: str  # what noticed it, or "survived"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def planted(mutant: Mutant) -> str:
    """The source with the bug in it. A text that is not there, or not once, is an error: mutants follow the code."""
    source = (ROOT / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.name}: {mutant.file} holds {source.count(mutant.old)} times {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


def _compile(source: Path, target: Path) -> None:
    pybind = []
    if source.name == "bind_cpu.cpp":
        import pybind11

        pybind = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    own = [] if pybind else ["-DFASTDIFF_ISA_NS=base"]
    command = [compiler(), *FLAGS, *pybind, *own, "-c", str(source), "-o", str(target)]
    subprocess.run([str(word) for word in command], check=True)


def _link(objects: Iterable[Path], target: Path) -> Path:
    subprocess.run([str(compiler()), "-shared", *map(str, objects), "-o", str(target), "-fopenmp"], check=True)
    return target


class Builder:
    """Builds the unchanged kernels once, then each mutant from the objects that it shares with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the longest first
        sources = [ROOT / "csrc/bind_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
        self.objects = {path.stem: folder / f"{path.stem}.o" for path in sources}
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(_compile, sources, self.objects.values()))

    def mutant(self, mutant: Mutant, number: int) -> Path:
        """The library with one file changed; of a header, with the sources of `mutant.unit` alone compiled anew."""
        home = self.folder / str(number)
        shutil.copytree(ROOT / "csrc", home / "csrc", ignore=shutil.ignore_patterns("cuda"))
        (home / mutant.file).write_text(planted(mutant))
        objects = dict(self.objects)
        for stem in (mutant.unit or Path(mutant.file).stem).split():
            objects[stem] = home / f"{stem}.o"
            _compile(home / f"csrc/cpu/{stem}.cpp", objects[stem])
        return _link(objects.values(), home / "_cpu.so")


def _module(name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _use(path: Path, file: str) -> str:
    """Put the built mutant in the place of the kernel; returns the backend that it belongs to."""
    if path.suffix == ".so":
        from fastdiff.ops import native

        # pybind11 knows modules by name and would return the one that is loaded
        native.cpu = _module("planted._cpu", path)
        return "cpp"
    package = importlib.import_module("fastdiff.ops")
    setattr(package, Path(file).stem, _module(f"fastdiff.ops.{Path(file).stem}", path))
    return "triton"


def _noticed(names: Iterable[str], backend: str, every: int, answers: dict[tuple[str, int], Known]) -> str | None:
    """The first complaint of the cells."""
    for name in names:
        for number, cell in list(enumerate(cells_of(name)))[::every]:
            for line in sweep.complaints(DESCRIPTIONS[name], cell, backend, answers.get((name, number))):
                return f"{name} {number}: {line}"
    return None


class Judge:
    """A process of its own: what the first cell that notices the bug says, or "survived"."""

    def __init__(
        self, path: Path, file: str, names: Iterable[str], every: int, answers: dict[tuple[str, int], Known]
    ) -> None:
        self.pipe, writing = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                said = _noticed(names, _use(path, file), every, answers) or "survived"
            except BaseException as error:
                said = f"raised {error!r}"
            os.write(writing, said.encode()[:2000])
            os._exit(0)
        os.close(writing)

    def says(self) -> str:
        with os.fdopen(self.pipe, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        _, status = os.waitpid(self.child, 0)
        return said if os.WIFEXITED(status) else f"died of signal {os.WTERMSIG(status)}"


def answered(names: Iterable[str], every: int) -> dict[tuple[str, int], Known]:
    """The oracle's answers to the cells, computed before the processes part."""
    return {
        (name, number): known(DESCRIPTIONS[name], cells_of(name)[number])
        for name in names
        for number in range(0, len(cells_of(name)), every)
    }


def _all(mutants: Iterable[Mutant]) -> list[str]:
    return sorted({name for mutant in mutants for name in mutant.cells})


def _judged(mutants: list[Mutant], build: Callable[[Mutant, int], Path], every: int) -> Iterator[Judged]:
    # all are built before the first process forks: threads would be missing in it
    with ThreadPoolExecutor(TOGETHER) as pool:
        built = [pool.submit(build, mutant, number) for number, mutant in enumerate(mutants)]
        answers = answered(_all(mutants), every)
    waiting: deque[tuple[str, Judge]] = deque()
    for mutant, made in zip(mutants, built, strict=True):
        if isinstance(error := made.exception(), LookupError):
            yield Judged(mutant.name, f"not planted: {error}")
            continue
        waiting.append((mutant.name, Judge(made.result(), mutant.file, mutant.cells, every, answers)))
        if len(waiting) == TOGETHER:
            name, first = waiting.popleft()
            yield Judged(name, first.says())
    for name, last in waiting:
        yield Judged(name, last.says())


def cpp(mutants: list[Mutant], folder: Path) -> Iterator[Judged]:
    """Judge C++ mutants; one that changes nothing comes first."""
    same = mutants[0]._replace(name=UNCHANGED, new=mutants[0].old, cells=tuple(_all(mutants)))
    yield from _judged([same, *mutants], Builder(folder).mutant, 1)


def triton(mutants: list[Mutant], folder: Path) -> Iterator[Judged]:
    """Judge Triton mutants, in a process with TRITON_INTERPRET=1."""
    importlib.import_module("triton.language")  # once for all that follow

    def build(mutant: Mutant, number: int) -> Path:
        path = folder / str(number) / Path(mutant.file).name
        path.parent.mkdir()
        path.write_text(planted(mutant))
        return path

    yield from _judged(mutants, build, 3)


def main(kind: str, folder: str, slow: bool) -> None:
    """Print a line a mutant: its name, a tab, what noticed it."""
    import torch

    from tests.ops import mutants_list

    torch.set_num_threads(1)
    chosen = [
        m
        for m in {"cpp": mutants_list.CPP, "triton": mutants_list.TRITON}[kind]
        if slow or m.name not in mutants_list.SLOW
    ]
    for found in {"cpp": cpp, "triton": triton}[kind](chosen, Path(folder)):
        print(found.mutant, " ".join(found.says.split()), sep="\t", flush=True)
