"""What stands in for CUDA's graphs where there is no GPU: it writes down what it is asked, and replays by calling."""

from fastdiff.sampling.capture import raising


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

    A real capture raises where the work asks the device for a number: this one where `forbidden` does.
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

    def record(self, work):
        if (sentence := self.forbidden()) is not None:
            raise RuntimeError(f"{sentence}\nmore lines")
        self.recordings.append(Recording(self, work))
        return self.recordings[-1]

    @staticmethod
    def forbidden():
        return None

    def culprit(self, work):
        return raising(work)

    @property
    def living(self):
        return [r for r in self.recordings if r.work is not None]

    def memory(self):
        return self.size * len(self.living)

    def release(self):
        assert not self.living, "the pool was given back under a living graph"
        self.released += 1
