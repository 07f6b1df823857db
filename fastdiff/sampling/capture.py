"""CUDA graphs, as much of them as `graph` needs: a side stream to warm up on, captures in one pool of memory."""

from __future__ import annotations

import contextlib
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


# One capture at a time, and nothing else of ours beside it: what torch is told for it holds for the whole process, and
# its allocator takes no orders meanwhile.
_ALONE = threading.RLock()
# one for all captures on a device: torch has 32 streams and gives them out in turn, and cuBLAS a workspace to each
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


class Cuda:
    """Captures on a side stream into one pool of memory, which all recordings share: no two run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._bytes = 0

    def warm(self, work: Callable[[], None]) -> None:
        """The work itself, on the side stream, in order with the caller's."""
        caller = torch.cuda.current_stream(self.device)
        with _ALONE:
            self.stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self.stream):
                    work()
            finally:
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
        # by an error instead of a warning, other threads would be hit
        with _ALONE, _debugged("warn"):
            return warned(lambda: self.warm(work), "synchronizing CUDA operation", last)

    def record(self, work: Callable[[], None]) -> Recorded:
        """A torch.cuda.CUDAGraph of the work."""
        with _ALONE:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.device)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on with work of their own
            capturing = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
            with self._mended(), torch.cuda.device(self.device), capturing:
                work()
            self._bytes += torch.cuda.memory_reserved(self.device) - before
        return graph

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """After a capture that failed, torch is left on the side stream, its generator and its allocator waiting for
        the capture's end.
        """
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        caller, generator = torch.cuda.current_stream(self.device), torch.cuda.default_generators[index]
        state = generator.get_state()
        try:
            yield
        except BaseException:
            torch.cuda.set_stream(caller)
            fresh = torch.Generator(self.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(index, self.pool)
                torch._C._cuda_releasePool(index, self.pool)
            self.pool = torch.cuda.graph_pool_handle()
            raise

    def memory(self) -> int:
        """What the allocator reserved for the captures."""
        return self._bytes

    def release(self) -> None:
        """The pool is empty now; its blocks go back to the device."""
        with _ALONE:
            self._bytes = 0
            self.pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()


@contextmanager
def _debugged(mode: str) -> Iterator[None]:
    """torch's debug mode for ops that wait, without its remark that it is a prototype."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Synchronization debug mode")
            torch.cuda.set_sync_debug_mode(mode)
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
    mine = threading.get_ident()  # what others do meanwhile does not count
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if text in str(message) and threading.get_ident() == mine:
                found.append(("" if last is None else last.name, f"{filename}:{lineno}"))
            else:
                others(message, category, filename, lineno, *rest)

        warnings.filterwarnings("always", message=f".*{text}")
        warnings.showwarning = show  # type: ignore[assignment]
        work()
    return found
