"""What stands in for CUDA's graphs where there is no GPU: it writes down what it is asked, and replays by calling."""

import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.sampling.capture import LastOp, warned


class Recording:
    """Captured work, whose replay is a call; it complains when used after its end."""

    def __init__(self, owner, work):
        self.owner, self.work, self.replays = owner, work, 0

    def replay(self):
        assert self.work is not None, "a graph was replayed after reset()"
        self.replays += 1
        self.work()

    def reset(self):
        assert self.work is not None, "a graph was reset twice"
        self.work = None


class FakeRecorder:
    """One for each set of buffers; `all` holds every one that was made since `forget()`.

    As on a GPU, the work that asks the device for a number cannot be captured.
    """

    all: list = []  # noqa: RUF012  shared on purpose
    size = 1000

    def __init__(self, device):
        self.device, self.warmed, self.recordings, self.released = device, 0, [], 0
        FakeRecorder.all.append(self)

    @classmethod
    def forget(cls):
        cls.all.clear()

    def warm(self, work):
        self.warmed += 1
        work()

    def _waits(self, work, last=None):
        with Reads():
            return warned(lambda: self.warm(work), "synchronizing", last)

    def probe(self, work):
        waits = self._waits(work)
        return waits[0][1] if waits else None

    def culprit(self, work):
        with LastOp() as last:
            waits = self._waits(work, last)
        return waits[0][0]

    def record(self, work):
        self.recordings.append(Recording(self, work))
        return self.recordings[-1]

    @property
    def living(self):
        return [r for r in self.recordings if r.work is not None]

    def memory(self):
        return self.size * len(self.living)

    def release(self):
        assert not self.living, "the pool was given back under a living graph"
        self.released += 1


class Reads(TorchDispatchMode):
    """Warns of each read of a tensor's number, as CUDA's debug mode does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return out


def replays():
    """Replays of each graph, by recorder, in the order of their capture."""
    return [[r.replays for r in recorder.recordings] for recorder in FakeRecorder.all]
