"""The one step as a CUDA graph: captured once, replayed for every row of every solver.

A replay reads its numbers where the capture read them, so that a new solver, step count, weight, seed or condition is a
copy into the buffers. What cannot be copied there (other weights' addresses, another backend, another precision) makes
the next loop capture again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.ops import dispatch
from fastdiff.sampling.capture import Cuda, Recorded, Recorder
from fastdiff.sampling.run import Eager, Run, Steps, eager
from fastdiff.sampling.state import Kind, Program, State

_ROWS_BEFORE = 2  # a capture


class CaptureError(RuntimeError):
    """The step cannot be captured into a graph; the message names the op. left: rows that were not run."""

    def __init__(self, why: str, left: int) -> None:
        super().__init__(f"the step cannot be captured into a CUDA graph: {why}; pass run=fd.eager")
        self.left = left


class _Made(NamedTuple):
    """What a graph was made for."""

    kind: Kind
    rows: int


class Graph:
    """A CUDA graph of the step, one for each kind of row that occurs.

    The first row of a kind is run as it is: that is the warm-up (lazy libraries, the convolutions' choices, a compiled
    network's compilation). The second shows whether the host waits for the device in it, where no graph can follow. The
    third is captured: no work is lost. unroll: rows in one graph where so many of a
    kind follow each other; fewer launches, a larger graph. step: the run whose step is captured, `fd.eager` or
    `fd.compiled`. benchmark: let cuDNN try its algorithms on the first row of a kind and keep the fastest; False where
    two processes must agree to the byte. recorder: what captures.
    """

    def __init__(
        self,
        program: Program,
        s: State,
        *,
        unroll: int = 1,
        step: Run = eager,
        benchmark: bool = True,
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        if unroll < 1:
            raise ValueError(f"fd.graph: unroll={unroll} is no number of rows; pass 1 or more")
        if recorder is None and s.x.device.type != "cuda":
            raise ValueError(f"fd.graph captures CUDA graphs and the network is on {s.x.device}; pass run=fd.auto")
        self.program, self.s, self.unroll, self.benchmark = program, s, unroll, benchmark
        self._step: Steps = step.steps(program, s)
        self._recorder = (recorder or Cuda)(s.x.device)
        self._warm: dict[Kind, int] = {}
        self._graphs: dict[_Made, Recorded] = {}
        self._weights = Weights(program.net)
        self._settings: tuple[Any, ...] = ()

    def begin(self) -> None:
        """Drop the graphs where they would read what is no longer true."""
        self._step.begin()
        settings = (self._weights.signature(), *_settings(self.s.x.device))
        if settings != self._settings:
            self._drop()
            self._weights = Weights(self.program.net)
            self._settings = (self._weights.signature(), *settings[1:])

    def run(self, kind: Kind, count: int, noise: Tensor | None = None) -> None:
        """`count` rows of one kind. Raises ValueError for noise of the caller's own, CaptureError."""
        if noise is not None:
            raise ValueError("noise: a captured step draws its own, by seed and index; pass run=fd.eager")
        with _fastest(self.benchmark), _casting():
            while count and self._warm.get(kind, 0) < _ROWS_BEFORE:
                count -= 1
                self._first_rows(kind, count)
            for rows in (self.unroll, 1):
                while count >= rows:
                    self._graph(_Made(kind, rows), count).replay()
                    count -= rows

    def _first_rows(self, kind: Kind, left: int) -> None:
        """The row that warms up, then the one that shows whether there can be a graph."""

        def work() -> None:
            self._step.run(kind, 1)

        self._warm[kind] = self._warm.get(kind, 0) + 1
        if self._warm[kind] < _ROWS_BEFORE:
            self._recorder.warm(work)
        elif (line := self._recorder.probe(work)) is not None:
            with _as_it_was(self.s):
                op = self._recorder.culprit(work)
            raise CaptureError(f"{op or 'an op'} ({line}) makes the host wait for the device", left)

    def _graph(self, made: _Made, left: int) -> Recorded:
        if made not in self._graphs:
            try:
                self._graphs[made] = self._recorder.record(lambda: self._step.run(made.kind, made.rows))
            except Exception as error:
                raise CaptureError(str(error).splitlines()[0], left) from error
        return self._graphs[made]

    @property
    def captured(self) -> list[tuple[Kind, int]]:
        """Kind and number of rows of each graph."""
        return [(made.kind, made.rows) for made in self._graphs]

    @property
    def memory(self) -> int:
        """Bytes that the graphs hold beside the buffers they work on."""
        return self._recorder.memory()

    def _drop(self) -> None:
        for graph in self._graphs.values():
            graph.reset()
        if self._graphs:
            self._graphs.clear()
            self._recorder.release()
        self._warm.clear()

    def close(self) -> None:
        """Free all graphs and their memory."""
        self._drop()
        self._settings = ()
        self._step.close()


class Weights:
    """Where the tensors of a network lie. A graph reads them there, whatever has become of the network since."""

    def __init__(self, net: Any) -> None:
        modules = list(net.modules()) if isinstance(net, nn.Module) else []
        self._tensors = [held for m in modules for held in (m._parameters, m._buffers) if held]
        self._modules = [m._modules for m in modules if m._modules]

    def signature(self) -> tuple[list[int], list[Any]]:
        """Addresses of parameters and buffers, and which modules there are: fast, for it is asked before each loop."""
        return (
            [t.data_ptr() for held in self._tensors for t in held.values() if t is not None],
            [part for held in self._modules for m in held.values() for part in (id(m), type(m))],
        )


def _settings(device: torch.device) -> tuple[Any, ...]:
    """What decides, beside its tensors, which kernels a step runs."""
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return (
        dispatch.asked(),
        torch.get_autocast_dtype(device.type) if casts else None,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )


@contextmanager
def _fastest(benchmark: bool) -> Iterator[None]:
    """cuDNN keeps, for the process, what it finds fastest for each shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _casting() -> Iterator[None]:
    """Autocast keeps copies of weights until its block ends; a graph would go on reading them. So none are kept."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _as_it_was(s: State) -> Iterator[None]:
    """Whatever is done to the state inside is undone."""
    parts = [s.x, s.x_in, s.h, s.k, s.bad]
    before = [part.clone() for part in parts]
    try:
        yield
    finally:
        for part, kept in zip(parts, before, strict=True):
            part.copy_(kept)


class Auto:
    """graph where it can be, else eager: on other devices, for noise of the caller's own, where no capture succeeds.

    The last is said once, with the op.
    """

    def __init__(self, program: Program, s: State, **options: Any) -> None:
        self._eager = Eager(program, s)
        captures = s.x.device.type == "cuda" or "recorder" in options
        self.graph = Graph(program, s, **options) if captures else None

    def begin(self) -> None:
        """What a graph must notice."""
        if self.graph is not None:
            self.graph.begin()

    def run(self, kind: Kind, count: int, noise: Tensor | None = None) -> None:
        """`count` rows of one kind, replayed or called."""
        if self.graph is None or noise is not None:
            self._eager.run(kind, count, noise)
            return
        try:
            self.graph.run(kind, count)
        except CaptureError as error:
            warnings.warn(f"{error}, as run=fd.auto does from here on", stacklevel=2)
            self.close()
            self.graph = None
            self._eager.run(kind, error.left)

    @property
    def memory(self) -> int:
        """Bytes of the graphs."""
        return 0 if self.graph is None else self.graph.memory

    def close(self) -> None:
        """Free the graphs."""
        if self.graph is not None:
            self.graph.close()


graph = Run("graph", Graph, static=lambda _: True)
"""A CUDA graph of the step; raises where there can be none."""

auto = Run("auto", Auto, static=lambda device: device.type == "cuda")
"""The run that `fd.sample` uses unless told otherwise: graph on CUDA devices, eager elsewhere."""
