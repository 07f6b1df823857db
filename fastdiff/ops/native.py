"""The compiled CPU kernels, `fastdiff._cpu`: here or not, which instruction set, and how tensors are handed to them.

Kernels take addresses and sizes. Their caller has checked shapes, dtypes and devices, and keeps the tensors alive.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

# torch first: its libgomp is then the one that the kernels share, thread pool and torch.set_num_threads included
import torch
from torch import Tensor

from fastdiff.ops import jit

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""The numbers of csrc/cpu/kernels.h."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> tuple[Any, str | None]:
    try:
        from fastdiff import _cpu
    except ImportError as error:
        # a name in FASTDIFF_ISA was asked for: it loads or raises
        if os.environ.get("FASTDIFF_ISA"):
            raise
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return None, (
                "fastdiff._cpu was not built when fastdiff was installed; install g++ and reinstall fastdiff with "
                "FASTDIFF_REQUIRE_CPP=1 and `pip install -v`, which shows what fails"
            )
        return None, f"fastdiff._cpu does not load: {error}"
    return _cpu, None


cpu, _missing = _load()


def missing() -> str | None:
    """Why the compiled kernels cannot run here, None when they can."""
    return _missing


def isa() -> str | None:
    """The instruction set in use, "v4", "v3" (x86-64 levels) or "base"; None without compiled kernels.

    FASTDIFF_ISA forces one; a name that this CPU or build lacks raises ImportError.
    """
    return None if cpu is None else str(cpu.isa)


class Strided(NamedTuple):
    """A tensor (N, C, *spatial) whose element (n, c, pixel) lies at n image + c channel + p pixel."""

    data: int
    dtype: int
    image: int
    channel: int
    pixel: int


NOTHING = Strided(0, 0, 0, 0, 0)


def steps(x: Tensor) -> tuple[int, int, int] | None:
    """How far apart images, channels and pixels lie; None where the pixels are no single run of equal steps."""
    # strides of what is empty say nothing, and contiguous() leaves them
    if x.numel() == 0:
        return 0, 0, 1
    shape, stride = x.shape, x.stride()
    pixel, run = 1, 1
    for axis in range(x.ndim - 1, 1, -1):
        if run == 1:
            pixel = stride[axis]
        elif shape[axis] != 1 and stride[axis] != pixel * run:
            return None
        run *= shape[axis]
    return stride[0], stride[1], pixel


def strided(x: Tensor) -> Strided | None:
    """How kernels address x; None where they cannot (a crop, a transpose), see `steps`."""
    found = steps(x)
    return None if found is None else Strided(x.data_ptr(), DTYPES[x.dtype], *found)


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself where it already is dense and of that dtype, else a copy."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def per_channel(v: Tensor | None) -> Tensor | None:
    """v, (C,) or (N, C), in fp32: the numbers of an image one behind the other, those of the next one anywhere.

    A slice of a wide row, as lines of a time table come, is taken as it lies.
    """
    if v is None:
        return None
    v = v.to(torch.float32)
    beside = v.stride(-1) == 1 or v.shape[-1] == 1
    # a compiler keeps what is dense dense; other strides of a graph may be none of those that were traced
    return v if beside and not jit.traced() else v.contiguous()


def apart(v: Tensor | None) -> int:
    """How far the numbers of an image lie from those of the next in what `per_channel` gives; 0 where all share one."""
    return int(v.stride(0)) if v is not None and v.ndim == 2 else 0


def tokens_apart(*parts: Tensor) -> int | None:
    """Numbers from one token (N, L, C) to the next of all images, where it is the same in all parts, else None."""
    n, tokens, channels = parts[0].shape
    apart = parts[0].stride(1 if tokens > 1 else 0)
    # the stride of an axis of one means nothing
    wanted = {0: tokens * apart if n > 1 else None, 1: apart if tokens > 1 else None, 2: 1 if channels > 1 else None}
    same = all(step is None or v.stride(axis) == step for v in parts for axis, step in wanted.items())
    return apart if same else None


LARGE = 32 << 20
"""More is mapped anew by each malloc (glibc's largest M_MMAP_THRESHOLD), and no cache keeps it for a reader."""


def fresh(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """An empty tensor here. A large one is asked for in huge pages: its first touch costs more than most kernels do."""
    return _in_huge_pages(torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout))


def fresh_like(x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """`fresh` of x's shape and dtype, which costs half as much to ask for."""
    return _in_huge_pages(torch.empty_like(x, memory_format=layout))


def _in_huge_pages(x: Tensor) -> Tensor:
    if x.nbytes > LARGE:
        cpu.advise_huge(x.data_ptr(), x.nbytes)
    return x


def address(x: Tensor | None) -> int:
    """The address of a dense tensor, 0 for None."""
    return 0 if x is None else x.data_ptr()


def refuses(*tensors: Tensor | None) -> str | None:
    """Why no CPU kernel takes these tensors: where they lie."""
    for x in tensors:
        if x is not None and not x.is_cpu:
            return f"the cpp kernels run on CPU tensors, got one on {x.device}"
    return None
