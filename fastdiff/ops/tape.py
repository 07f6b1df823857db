"""A tape: the CPU kernels of a network, recorded once and played again on the same memory.

    with recording_on(tape):  y = net(x)        runs net, and records what it ran
    x.copy_(...);  tape.play()                  y holds the new result

Between two kernels of a network Python takes longer than a small one runs, and each result is in pages that were never
touched. A tape has neither: kernels follow each other in C++, in an arena whose memory is used again as soon as what
lay there is dead, which the recorded run showed. The CUDA graph of a CPU.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import native

LINE = 64
CHUNK = 32 << 20


class NotRecorded(RuntimeError):
    """A kernel would read what no recorded one had written."""


class Arena:
    """Memory that is given out and taken back, and stays where it is."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._free: list[tuple[int, int]] = []  # (first, end) in bytes, by address

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor; its memory is given out again when the last tensor on it is gone."""
        size = -(-max(1, math.prod(shape) * dtype.itemsize) // LINE) * LINE
        first = self._take(size)
        chunk = self._chunk(first)
        at = first - chunk.data_ptr()
        # a tensor's storage holds the array, whatever views there are
        array = chunk[at : at + size].numpy()[:]
        weakref.finalize(array, self._give, first, size).atexit = False
        return torch.from_numpy(array).view(dtype)[: math.prod(shape)].view(shape)

    def _take(self, size: int) -> int:
        fits = [(end - first, i) for i, (first, end) in enumerate(self._free) if end - first >= size]
        if not fits:
            chunk = torch.empty(max(CHUNK, size) + LINE, dtype=torch.uint8, device="cpu")
            native.cpu.advise_huge(chunk.data_ptr(), chunk.nbytes)
            self._chunks.append(chunk)
            first = -(-chunk.data_ptr() // LINE) * LINE
            self._give(first, max(CHUNK, size))
            return self._take(size)
        first, end = self._free.pop(min(fits)[1])
        if end - first > size:
            self._give(first + size, end - first - size)
        return first

    def _give(self, first: int, size: int) -> None:
        spans: list[tuple[int, int]] = []
        for low, high in sorted([*self._free, (first, first + size)]):
            if spans and spans[-1][1] == low:
                spans[-1] = spans[-1][0], high
            else:
                spans.append((low, high))
        self._free = spans

    def view(self, x: Tensor) -> Tensor:
        """x, which lies here, as a tensor that does not keep its memory from being given out again."""
        chunk = self._chunk(x.data_ptr())
        return chunk.view(x.dtype).as_strided(x.shape, x.stride(), (x.data_ptr() - chunk.data_ptr()) // x.itemsize)

    def _chunk(self, address: int) -> Tensor:
        return next(c for c in self._chunks if c.data_ptr() <= address < c.data_ptr() + c.nbytes)

    def holds(self, x: Tensor) -> bool:
        """Whether x lies here."""
        return any(c.data_ptr() <= x.data_ptr() < c.data_ptr() + c.nbytes for c in self._chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(c.nbytes for c in self._chunks)


class Tape:
    """Kernels in the order in which they ran, and what ran between them."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.empty = self.arena.empty
        self._calls = native.cpu.Tape()
        self._steps: list[tuple[int, int] | Callable[[], object]] = []

    def conv(self, call: tuple[Any, ...], *read: Tensor | None) -> None:
        """Record a call of `native.cpu.conv`, which reads these tensors beside its parameters."""
        self._known(*read)
        self._kernel(self._calls.conv(call))

    def attention(self, call: tuple[int, ...], *read: Tensor | None) -> None:
        """Record a call of `native.cpu.attention`, which reads these tensors."""
        self._known(*read)
        self._kernel(self._calls.attention(call))

    def linear(self, call: tuple[Any, ...], *read: Tensor | None) -> None:
        """Record a call of `native.cpu.linear`, which reads these tensors beside its parameters."""
        self._known(*read)
        self._kernel(self._calls.linear(call))

    def _kernel(self, end: int) -> None:
        last = self._steps[-1] if self._steps else None
        if isinstance(last, tuple):
            self._steps[-1] = last[0], end
        else:
            self._steps.append((end - 1, end))

    def beside(self, f: Callable[..., Tensor], *read: Tensor) -> Tensor:
        """f(*read), recorded: torch's own ops."""
        self._known(*read)
        y = f(*read)
        order = sorted(range(y.ndim), key=y.stride, reverse=True)
        place = self.empty(tuple(y.shape[i] for i in order), y.dtype)
        kept = place.permute([order.index(i) for i in range(y.ndim)])
        kept.copy_(y)
        self._steps.append(partial(_again, f, [self.arena.view(v) for v in read], self.arena.view(kept)))
        return kept

    def _known(self, *read: Tensor | None) -> None:
        for x in read:
            if x is not None and x.numel() and not self.arena.holds(x):
                raise NotRecorded(f"a kernel reads {tuple(x.shape)} outside of the tape")

    def play(self) -> None:
        """Run all again."""
        threads = torch.get_num_threads()
        for step in self._steps:
            if isinstance(step, tuple):
                self._calls.play(*step, threads)
            else:
                step()


def _again(f: Callable[..., Tensor], read: list[Tensor], y: Tensor) -> None:
    y.copy_(f(*read))


_here = threading.local()


def recording() -> Tape | None:
    """The tape that this thread records on."""
    tape: Tape | None = getattr(_here, "tape", None)
    return tape


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A dense tensor on the CPU for what a kernel writes, of the tape where one is recorded."""
    tape = recording()
    return torch.empty(shape, dtype=dtype, device="cpu") if tape is None else tape.empty(shape, dtype)


@contextlib.contextmanager
def recording_on(tape: Tape) -> Iterator[None]:
    """Within the block kernels that this thread runs are recorded."""
    _here.tape = tape
    try:
        yield
    finally:
        _here.tape = None


def beside(f: Callable[..., Tensor], *read: Tensor) -> Tensor:
    """f(*read), recorded where a tape is: for what is no kernel of ours."""
    tape = None if torch.compiler.is_compiling() else recording()
    return f(*read) if tape is None else tape.beside(f, *read)
