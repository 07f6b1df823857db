"""The run unless told otherwise: a CUDA graph where there can be one, else eager."""

from __future__ import annotations

import inspect
import warnings
from typing import Any
from weakref import WeakSet

from torch import Tensor

from fastdiff.sampling.graph import CaptureError, Graph
from fastdiff.sampling.run import Eager, Run, known
from fastdiff.sampling.state import Kind, Program, State


class Auto:
    """graph where it can be, else eager: on other devices, for noise of the caller's own, where no capture succeeds.

    The last is said once, with the op.
    """

    def __init__(self, program: Program, s: State, **options: Any) -> None:
        self._eager = Eager(program, s)
        captures = s.x.device.type == "cuda" or "recorder" in options
        known(options, "auto", Graph)
        self.graph = Graph(program, s, **{"worth": 8, **options}) if captures else None

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
            _say_once(self.graph.program.net, f"{error}, as run=fd.auto does from here on")
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


_told: WeakSet[Any] = WeakSet()


def _say_once(net: Any, sentence: str) -> None:
    """A warning at the caller of the sampler, once for a network."""
    if net not in _told:
        _told.add(net)
        warnings.warn(sentence, stacklevel=_frames_of_ours() + 1)


def _frames_of_ours() -> int:
    """How many callers are code of this package."""
    frame, count = inspect.currentframe(), 0
    while frame is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] == __name__.split(".")[0]:
        frame, count = frame.f_back, count + 1
    return count


auto = Run("auto", Auto, static=lambda device: device.type == "cuda")
"""The run that `fd.sample` uses unless told otherwise: graph on CUDA devices, eager elsewhere."""
