"""Ahead-of-time compiles of what a launcher launches, for GPUs that this machine does not have.

    launches = aot.launches(q_sample_triton.run, x0, t, table, seed=seed, index=index)    CPU or meta tensors
    code = aot.compile(launches[0], "sm_90")

`launches` runs the launcher with `jit.launch` replaced by one that takes notes, so a launcher must call it as
`jit.launch(kernel, grid)(...)` and never read what it launches. `compile` takes those very arguments through Triton's
own specialisation (alignment, sizes divisible by 16, sizes of 1), so what is proved here is what runs there.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from fastdiff.ops import jit

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}

NVIDIA = tuple(name for name in TARGETS if name.startswith("sm_"))

SHARED = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED |= dict.fromkeys(("gfx942", "gfx1100"), 64)
"""KiB of shared memory that one block may have."""


class Launch(NamedTuple):
    """One kernel launch: kernel[grid](*args, **options)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Code(NamedTuple):
    """What a launch compiles to. On AMD there is no ptx and no sass, and `assembly` is LLVM's."""

    launch: Launch
    target: str
    assembly: str  # PTX, or AMD's assembly
    sass: tuple[str, ...]  # one instruction each, without address, encoding and padding
    registers: int
    stack: int  # bytes a thread, spills included
    shared: int  # bytes a block
    warps: int

    def count(self, pattern: str) -> int:
        """SASS instructions that the regular expression matches somewhere."""
        return sum(re.search(pattern, instruction) is not None for instruction in self.sass)

    def accesses(self, opcode: str) -> dict[int, int]:
        """{bits: how many} of the global loads ("LDG") or stores ("STG") by their width."""
        widths: dict[int, int] = {}
        for instruction in self.sass:
            if found := re.search(rf"\b{opcode}\.E([.\w]*)", instruction):
                size = re.search(r"\.[US]?(8|16|64|128|256)\b", found[1])
                width = int(size[1]) if size else 32
                widths[width] = widths.get(width, 0) + 1
        return widths

    def per_element(self, elements: int) -> float:
        """SASS instructions times threads over elements, for a kernel without loops; both sides of a branch count."""
        threads = math.prod(self.launch.grid) * self.warps * TARGETS[self.target].warp_size
        return len(self.sass) * threads / elements

    def drawing(self, elements: int) -> float:
        """`per_element` on the shortest path that draws noise: that of a row which keeps no history."""
        threads = math.prod(self.launch.grid) * self.warps * TARGETS[self.target].warp_size
        return _shortest(self.sass, "MUFU.LG2") * threads / elements

    def check(self) -> None:
        """What holds for every kernel on every target: no stack, no spill, shared memory within the limit."""
        assert self.stack == 0, f"{self.target}: {self.stack} bytes of stack or spill"
        assert self.count(r"\b(LDL|STL)\b") == 0, f"{self.target}: local memory is accessed"
        assert self.shared <= SHARED[self.target] * 1024, f"{self.target}: {self.shared} bytes of shared memory"


def launches(run: Callable[..., Any], *args: Any, **given: Any) -> list[Launch]:
    """The kernels that `run(*args, **given)` would launch; nothing is launched."""
    seen: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *a, **options: seen.append(Launch(kernel, grid, a, options))

    with mock.patch.object(jit, "launch", launch):
        run(*args, **given)
    return seen


def compile(launch: Launch, target: str) -> Code:
    """Compile one launch for a target of TARGETS."""
    with driver(target), _cache():
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    warps = compiled.metadata.num_warps
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        spilled = field["vgpr_spill_count"] + field["sgpr_spill_count"]
        stack = field["private_segment_fixed_size"] + 4 * spilled
        return Code(launch, target, text, (), field["vgpr_count"], stack, compiled.metadata.shared, warps)
    registers, stack, sass = _inspect(compiled.asm["cubin"])
    return Code(launch, target, compiled.asm["ptx"], sass, registers, stack, compiled.metadata.shared, warps)


class _Driver(triton.backends.driver.DriverBase):
    """A device that can be compiled for and not launched on."""

    def __init__(self, target: str):
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    # the JIT keeps one binder a device: each target is its own
    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, _: str) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def driver(target: str) -> Iterator[None]:
    """Within the block Triton compiles for `target`, and tells it to those who ask what the GPU is."""
    # no public way to ask without creating one, which fails where there is no GPU
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(target))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastdiff-aot-")


@contextlib.contextmanager
def _cache() -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = _folder().name
        yield


def _shortest(sass: tuple[str, ...], most: str) -> int:
    """Instructions on the path through a kernel without loops that meets `most` oftenest, and is shortest of those."""
    best: list[tuple[int, int] | None] = [None] * (len(sass) + 1)
    best[0] = (0, 0)
    for at, instruction in enumerate(sass):
        here = best[at]
        if here is None:
            continue
        after = (here[0] - (most in instruction), here[1] + 1)
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        target = int(jump[1], 16) // 16 if jump else at
        assert jump is None or at < target <= len(sass), f"a loop: {instruction}"
        always = not instruction.startswith("@") and not (jump and re.search(r"\bU?P\d", instruction))
        ways = ([target] if jump else []) + ([] if always and re.search(r"\b(BRA|EXIT)\b", instruction) else [at + 1])
        for way in ways if not instruction.endswith("EXIT") or not always else [len(sass)]:
            best[way] = min(after, best[way] or after)
    end = best[len(sass)]
    assert end is not None
    return end[1]


@functools.cache
def _inspect(cubin: bytes) -> tuple[int, int, tuple[str, ...]]:
    """(registers, bytes of stack, instructions) by the disassembler that Triton carries."""
    path = Path(_folder().name) / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert usage is not None, text[:1000]
    instructions = [found[1].strip() for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+([^;/]+);", text)]
    while re.match(r"NOP|BRA", instructions[-1]):
        instructions.pop()
    return int(usage[1]), int(usage[2]) + int(usage[3]), tuple(instructions)
