"""CUDA graphs, as much of them as `graph` needs: a side stream to warm up on, captures in one pool of memory."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(Protocol):
    """Work that was captured."""

    def replay(self) -> None:
        """Do it again, on the same buffers."""

    def reset(self) -> None:
        """Give its memory back."""


class Recorder(Protocol):
    """What captures work; `Cuda` here, and one that writes down what it is asked in the tests."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do the work where it will be captured, so that all that happens once has happened."""

    def probe(self, work: Callable[[], None]) -> str | None:
        """Do the work and see whether it can be captured; where not, the line of code that makes the host wait."""

    def culprit(self, work: Callable[[], None]) -> str | None:
        """The op in that line, by doing the work once more."""

    def record(self, work: Callable[[], None]) -> Recorded:
        """Capture the work without doing it."""

    def memory(self) -> int:
        """Bytes that the recordings hold beside the buffers they work on."""

    def release(self) -> None:
        """All recordings are gone: give back what they shared."""


# torch allows one capture at a time in a process
_CAPTURING = threading.Lock()


class Cuda:
    """Captures on a stream of its own into one pool of memory, which all recordings share: no two run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self._bytes = 0

    def warm(self, work: Callable[[], None]) -> None:
        """The work itself, on the side stream, in order with the caller's."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            work()
        caller.wait_stream(self.stream)

    def probe(self, work: Callable[[], None]) -> str | None:
        """file:line. A capture that fails leaves a mess behind, so that it is not tried."""
        waits = self._waits(work)
        return waits[0][1] if waits else None

    def culprit(self, work: Callable[[], None]) -> str | None:
        """The op, seen by a dispatch mode, under which a compiled network would not be what it is."""
        with LastOp() as last:  # type: ignore[no-untyped-call]
            waits = self._waits(work, last)
        return waits[0][0] if waits else None

    def _waits(self, work: Callable[[], None], last: LastOp | None = None) -> list[tuple[str, str]]:
        before = torch.cuda.get_sync_debug_mode()
        # by an error instead of a warning, other threads would be hit
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return warned(lambda: self.warm(work), "synchronizing CUDA operation", last)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, work: Callable[[], None]) -> Recorded:
        """A torch.cuda.CUDAGraph of the work."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with work of their own
        capturing = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with _CAPTURING, _mended(self.device), torch.cuda.device(self.device), capturing:
            work()
        self._bytes += torch.cuda.memory_reserved(self.device) - before
        return graph

    def memory(self) -> int:
        """What the allocator reserved for the captures."""
        return self._bytes

    def release(self) -> None:
        """The pool is empty now; its blocks go back to the device."""
        self._bytes = 0
        torch.cuda.empty_cache()


@contextmanager
def _mended(device: torch.device) -> Iterator[None]:
    """After a capture that failed, torch is left on the side stream, its generator waiting for the capture's end."""
    caller, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    try:
        yield
    except Exception:
        torch.cuda.set_stream(caller)
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


class LastOp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the op that was called last."""

    name = "an op"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write its name down and call it."""
        self.name = str(func)
        return func(*args, **(kwargs or {}))


def warned(work: Callable[[], None], text: str, last: LastOp | None = None) -> list[tuple[str, str]]:
    """Do the work; the op (where a mode sees it) and file:line of each warning with `text` in it. Others pass."""
    found: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if text in str(message):
                found.append(("" if last is None else last.name, f"{filename}:{lineno}"))
            else:
                others(message, category, filename, lineno, *rest)

        warnings.filterwarnings("always", message=f".*{text}")
        warnings.showwarning = show  # type: ignore[assignment]
        work()
    return found
