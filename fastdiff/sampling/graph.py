"""The one step as a CUDA graph: captured once, replayed for every row of every solver.

A replay reads its numbers where the capture read them, so that a new solver, step count, weight, seed or condition is a
copy into the buffers. What cannot be copied there (other weights' addresses, another backend, another precision) makes
the next loop capture again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.sampling.capture import Cuda, Recorded, Recorder
from fastdiff.sampling.run import Run, Steps, eager
from fastdiff.sampling.state import Kind, Program, State
from fastdiff.sampling.surroundings import Weights, casting, fastest, settings

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
    third is captured: no work is lost.

    unroll: rows in one graph where so many of a kind follow each other: fewer launches, a larger graph. step: the run
    whose step is captured, `fd.eager` or `fd.compiled`. benchmark: let cuDNN try its algorithms on the first row of a
    kind and keep the fastest; False where two processes must agree to the byte. worth: rows of a kind, run and asked
    for, that a capture must be good for. recorder: what captures.
    """

    def __init__(
        self,
        program: Program,
        s: State,
        *,
        unroll: int = 1,
        step: Run = eager,
        benchmark: bool = True,
        worth: int = 0,
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        if unroll < 1:
            raise ValueError(f"fd.graph: unroll={unroll} is no number of rows; pass 1 or more")
        if recorder is None and s.x.device.type != "cuda":
            raise ValueError(f"fd.graph captures CUDA graphs and the network is on {s.x.device}; pass run=fd.auto")
        self.program, self.s, self.unroll, self.benchmark, self.worth = program, s, unroll, benchmark, worth
        self._step: Steps = step.steps(program, s)
        self._recorder = (recorder or Cuda)(s.x.device)
        self._warm: dict[tuple[Kind, int], int] = {}  # rows that each thread ran: cuDNN's choices are a thread's own
        self._seen: dict[Kind, int] = {}
        self._graphs: dict[_Made, Recorded] = {}
        self._weights = Weights(program)
        self._found: tuple[Any, ...] = ()

    def begin(self) -> None:
        """Drop the graphs where they would read what is no longer true."""
        self._step.begin()
        found = (self._weights.signature(), *settings(self.s.x.device))
        if found != self._found:
            self._drop()
            self._weights = Weights(self.program)
            self._found = (self._weights.signature(), *found[1:])

    def run(self, kind: Kind, count: int, noise: Tensor | None = None) -> None:
        """`count` rows of one kind. Raises ValueError for noise of the caller's own, CaptureError."""
        if noise is not None:
            raise ValueError("noise: a captured step draws its own, by seed and index; pass run=fd.eager")
        self._seen[kind] = self._seen.get(kind, 0) + count
        while count:
            made = _Made(kind, self.unroll if count >= self.unroll else 1)
            if made in self._graphs:
                self._graphs[made].replay()
                count -= made.rows
            elif self._warm.get((kind, threading.get_ident()), 0) < _ROWS_BEFORE or self._seen[kind] < self.worth:
                count -= 1
                self._row(kind, count)
            else:
                self._capture(made, count)

    def _row(self, kind: Kind, left: int) -> None:
        """A row as it is: the first warms up, the second shows whether there can be a graph."""

        def work() -> None:
            self._step.run(kind, 1)

        key = kind, threading.get_ident()
        ran = self._warm.get(key, 0)
        with fastest(self.benchmark), casting():
            line = None
            if ran == 1:
                line = self._recorder.probe(work)
            else:
                self._recorder.warm(work)
            self._warm[key] = ran + 1
            if line is not None:
                with _as_it_was(self.s):
                    op = self._recorder.culprit(work)
                raise CaptureError(f"{op or 'an op'} ({line}) makes the host wait for the device", left)

    def _capture(self, made: _Made, left: int) -> None:
        try:
            with fastest(self.benchmark), casting():
                self._graphs[made] = self._recorder.record(lambda: self._step.run(made.kind, made.rows))
        except Exception as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise CaptureError(why, left) from error

    @property
    def captured(self) -> list[_Made]:
        """Kind and number of rows of each graph."""
        return list(self._graphs)

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
        self._seen.clear()

    def close(self) -> None:
        """Free all graphs and their memory."""
        self._drop()
        self._found = ()
        self._step.close()


@contextmanager
def _as_it_was(s: State) -> Iterator[None]:
    """The last row once more, and whatever it does to the state is undone."""
    parts = [part for part in (s.x, s.x_in, s.h, s.x0, s.deep, s.k, s.bad) if part is not None]
    before = [part.clone() for part in parts]
    s.k.sub_(1)  # the row that was just run: there may be no other
    try:
        yield
    finally:
        for part, kept in zip(parts, before, strict=True):
            part.copy_(kept)


graph = Run("graph", Graph, static=lambda _: True)
"""A CUDA graph of the step; raises where there can be none."""
