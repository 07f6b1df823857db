"""What `Cuda` asks of torch.cuda, on one that writes it down; on a real one: test_graph_gpu.py."""

import contextlib
import threading
import warnings

import pytest
import torch

from fastdiff.sampling import capture


class Stream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Generator:
    log: list[str] = []  # noqa: RUF012  of the test that runs

    def __init__(self, device=None):
        self.state = "as it was"

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def graphsafe_get_state(self):
        return f"a fresh {self.state}"

    def graphsafe_set_state(self, state):
        self.log.append(f"generator: {state}")


@pytest.fixture
def log(monkeypatch):
    """torch.cuda, as far as `Cuda` uses it."""
    said = Generator.log = []
    reserved = iter([100, 164, 200, 200])

    @contextlib.contextmanager
    def on(what):
        said.append(f"enter {getattr(what, 'name', what)}")
        yield
        said.append(f"leave {getattr(what, 'name', what)}")

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        said.append(f"capture into {pool} on {stream.name}, {capture_error_mode}")
        yield
        said.append("captured")

    fakes = {
        "Stream": lambda device: Stream(said, "side"),
        "current_stream": lambda device=None: Stream(said, "caller"),
        "set_stream": lambda stream: said.append(f"back on {stream.name}"),
        "graph_pool_handle": lambda: "pool",
        "stream": on,
        "device": on,
        "graph": graph,
        "CUDAGraph": lambda: "graph",
        "synchronize": lambda device: said.append("synchronize"),
        "empty_cache": lambda: said.append("empty"),
        "memory_reserved": lambda device: next(reserved),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: said.append(f"sync mode {mode}"),
        "default_generators": [Generator()],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", Generator)
    return said


DEVICE = torch.device("cuda", 0)


def test_the_first_row_is_in_order_with_the_callers_work(log):
    capture.Cuda(DEVICE).warm(lambda: log.append("work"))
    assert log == ["side waits for caller", "enter side", "work", "leave side", "caller waits for side"]


def test_a_capture_and_its_memory(log):
    recorder = capture.Cuda(DEVICE)
    assert recorder.record(lambda: log.append("work")) == "graph"
    wanted = ["synchronize", "empty", "enter cuda:0", "capture into pool on side, thread_local", "work", "captured"]
    assert log == [*wanted, "leave cuda:0"]
    assert recorder.memory() == 64
    recorder.release()
    assert recorder.memory() == 0
    assert log[-1] == "empty"


def test_after_a_capture_that_failed_torch_is_as_it_was(log):
    def work():
        raise RuntimeError("no capture")

    recorder = capture.Cuda(DEVICE)
    with pytest.raises(RuntimeError, match="no capture"):
        recorder.record(work)
    assert log[-2:] == ["back on caller", "generator: a fresh as it was"]
    assert recorder.memory() == 0
    assert recorder.pool == "pool"


def test_a_wait_is_found_with_its_line_and_its_op(log):
    def work():
        torch.ones(1).add(1)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at somewhere)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    recorder = capture.Cuda(DEVICE)
    with pytest.warns(UserWarning, match="something else"):
        line = recorder.probe(work)
    with pytest.warns(UserWarning, match="something else"):
        assert recorder.culprit(work) == "aten.add.Tensor"
    assert line is not None
    assert line.startswith(__file__)
    assert recorder.probe(lambda: None) is None
    other = threading.Thread(target=work)
    with pytest.warns(UserWarning, match="something else"), pytest.warns(UserWarning, match="synchronizing"):
        assert recorder.probe(lambda: (other.start(), other.join())) is None  # somebody else's
    assert recorder.culprit(lambda: None) is None
    assert [entry for entry in log if "sync" in entry] == ["sync mode warn", "sync mode 0"] * 5
