"""A network on a GPU as CUDA graphs, one for each shape that it is called with: a replay costs the host one launch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.formats.diffusers.forward import Call
from fastdiff.sampling.capture import Cuda, Recorded, Recorder
from fastdiff.sampling.guidance import map_cond
from fastdiff.sampling.surroundings import settings

KEPT = 8
"""Shapes; the one not used for longest goes first."""


class Shape:
    """Static inputs of one shape and what was captured on them."""

    def __init__(self, call: Call) -> None:
        self.inputs = _tensors(torch.empty_like, call)
        self.calls = 0
        self.graph: Recorded | None = None
        self.waits = False
        self.F: Tensor | None = None

    def fill(self, call: Call) -> None:
        """Copy the call's numbers in."""
        held, given = _flat(self.inputs), _flat(call)
        for a, b in zip(held, given, strict=True):
            a.copy_(b)


class Graphs:
    """F = run(x, t, cond, residuals=...): a shape is warmed up, then watched, then captured, a call each.

    Nothing is compiled. What makes the host wait for the device cannot be captured, and stays as it is. recorder: what
    captures.
    """

    def __init__(self, run: Callable[..., Tensor], recorder: Callable[[torch.device], Recorder] = Cuda) -> None:
        self.run, self._make = run, recorder
        self._recorder: Recorder | None = None
        self._shapes: OrderedDict[tuple[Any, ...], Shape] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> Tensor:
        """F, a tensor of the caller's own."""
        tensors = _flat(call)
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
        if wanted or not self._lock.acquire(blocking=False):
            return self._run(call)
        try:
            with torch.no_grad():
                return self._played(call, tensors)
        finally:
            self._lock.release()

    def _run(self, call: Call) -> Tensor:
        F: Tensor = self.run(call.x, call.t, call.cond, residuals=call.residuals)
        return F

    def _played(self, call: Call, tensors: list[Tensor]) -> Tensor:
        self._recorder = self._recorder or self._make(call.x.device)
        form = tuple((tuple(v.shape), v.stride(), v.dtype) for v in tensors)
        key = (settings(call.x.device), form, _keys(call.cond), call.residuals is None)
        if key not in self._shapes:
            self._shapes[key] = Shape(call)
            while len(self._shapes) > KEPT:
                _, old = self._shapes.popitem(last=False)
                if old.graph is not None:
                    old.graph.reset()
        self._shapes.move_to_end(key)
        shape = self._shapes[key]
        shape.fill(call)
        self._once(shape)
        assert shape.F is not None
        return shape.F.clone()

    def _once(self, shape: Shape) -> None:
        assert self._recorder is not None
        work = partial(self._work, shape)
        shape.calls += 1
        if shape.graph is not None:
            shape.graph.replay()
        elif shape.waits:
            work()
        elif shape.calls == 1:
            self._recorder.warm(work)
        elif shape.calls == 2:
            shape.waits = self._recorder.probe(work) is not None
        else:
            shape.graph = self._recorder.record(work)
            shape.graph.replay()

    def _work(self, shape: Shape) -> None:
        shape.F = self._run(shape.inputs)

    def close(self) -> None:
        """Free all graphs and their memory."""
        for shape in self._shapes.values():
            if shape.graph is not None:
                shape.graph.reset()
        self._shapes.clear()
        if self._recorder is not None:
            self._recorder.release()


def _tensors(f: Callable[[Tensor], Tensor], call: Call) -> Call:
    """The call with f of each of its tensors."""
    residuals = None if call.residuals is None else [f(r) for r in call.residuals]
    return call._replace(x=f(call.x), t=f(call.t.contiguous()), cond=map_cond(f, call.cond), residuals=residuals)


def _flat(call: Call) -> list[Tensor]:
    found: list[Tensor] = []

    def note(v: Tensor) -> Tensor:
        found.append(v)
        return v

    _tensors(note, call)
    return found


def _keys(cond: Any) -> tuple[str, ...]:
    return tuple(cond) if isinstance(cond, dict) else ()
