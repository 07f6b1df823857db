"""CUDA graphs, as much of them as `graph` needs: a side stream to warm up on, captures in one pool of memory."""

from __future__ import annotations

from collections.abc import Callable
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

    def record(self, work: Callable[[], None]) -> Recorded:
        """Capture the work without doing it."""

    def culprit(self, work: Callable[[], None]) -> str | None:
        """The op of the work that cannot be captured, found by doing it; None where it does not show."""

    def memory(self) -> int:
        """Bytes that the recordings hold beside the buffers they work on."""

    def release(self) -> None:
        """All recordings are gone: give back what they shared."""


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

    def record(self, work: Callable[[], None]) -> Recorded:
        """A torch.cuda.CUDAGraph of the work. Raises RuntimeError where the host asks for what is not there yet."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with work of their own
        capturing = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), capturing:
            work()
        self._bytes += torch.cuda.memory_reserved(self.device) - before
        return graph

    def culprit(self, work: Callable[[], None]) -> str | None:
        """The op that makes the host wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return raising(work)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def memory(self) -> int:
        """What the allocator reserved for the captures."""
        return self._bytes

    def release(self) -> None:
        """The pool is empty now; its blocks go back to the device."""
        self._bytes = 0
        torch.cuda.empty_cache()


def raising(work: Callable[[], None]) -> str | None:
    """The op in which the work raises, None where it does not."""
    called = ["an op outside torch"]

    class LastOp(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[0] = str(func)
            return func(*args, **(kwargs or {}))

    with LastOp():  # type: ignore[no-untyped-call]
        try:
            work()
        except Exception:
            return called[0]
    return None
