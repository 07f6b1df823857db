"""What nvcc and ptxas made of a .cu file: registers, spills, and the machine code as cuobjdump prints it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import deque
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parents[2] / "csrc/cuda"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-DNDEBUG")

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;")
_COMPILED = re.compile(
    r"Compiling entry function '(\S+)'.*?\n.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?\n.*?Used (\d+) registers"
)


class Kernel(NamedTuple):
    name: str
    stack: int
    spill: int
    registers: int
    code: list[tuple[int, str]]  # address, instruction

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in self.code)


def cuobjdump() -> str | None:
    """nvcc's, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.is_file() else None
    return found


def compiled(source: Path, arch: int, folder: Path) -> list[Kernel]:
    """The kernels of one source for one architecture."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", *FLAGS, "-Xptxas", "-v", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    tool = cuobjdump()
    assert tool is not None
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    told = {name: tuple(map(int, numbers)) for name, *numbers in _COMPILED.findall(done.stderr)}
    kernels = []
    for part in text.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        stack, stores, loads, registers = told.pop(name)
        code = [(int(at, 16), what) for at, what in _INSTRUCTION.findall(part) if not what.startswith("NOP")]
        kernels.append(Kernel(name, stack, stores + loads, registers, code))
    assert not told, f"in ptxas' report only: {list(told)}"
    return kernels


def fewest(kernel: Kernel, wanted: dict[str, int]) -> int:
    """Instructions on the shortest way through a kernel that meets each pattern of `wanted` so many times.

    Such a way is what a thread executes at least: branches are taken as if each could go either way.
    """
    index = {address: i for i, (address, _) in enumerate(kernel.code)}
    patterns, goal = [re.compile(p) for p in wanted], tuple(wanted.values())

    def met(i: int, state: tuple[int, ...]) -> tuple[int, ...]:
        text = kernel.code[i][1]
        return tuple(min(g, s + bool(p.search(text))) for p, s, g in zip(patterns, state, goal, strict=True))

    def following(i: int) -> list[int]:
        text = kernel.code[i][1]
        branch = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
        always = not text.startswith("@")
        after = [i + 1] if i + 1 < len(kernel.code) else []
        if branch is None:
            return [] if always and re.match(r"(EXIT|RET)", text) else after
        target = [index[int(branch[1], 16)]]
        # `BRA.DIV` and friends name a predicate behind the mnemonic
        return target if always and re.match(r"BRA 0x", text) else target + after

    start = (0, met(0, (0,) * len(goal)))
    queue, far = deque([start]), {start: 1}
    while queue:
        i, state = queue.popleft()
        if state == goal and "EXIT" in kernel.code[i][1]:
            return far[i, state]
        for j in following(i):
            new = (j, met(j, state))
            if new not in far:
                far[new] = far[i, state] + 1
                queue.append(new)
    raise AssertionError(f"{kernel.name}: no way meets {wanted}")
