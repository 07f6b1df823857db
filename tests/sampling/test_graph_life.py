"""Graphs of many shapes: padding, eviction, closing, threads, and what happens where there can be no graph."""

import gc
import threading
import warnings
import weakref

import pytest
import torch

import fastdiff as fd
from fastdiff.sampling.sampler import bucket
from tests.sampling.recorder import FakeRecorder, replays

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 1, 8, 8)
COND = torch.tensor([3, 1, 4, 1])


def test_batches_are_padded_to_buckets(den, run):
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 24, 25, 33)] == [
        *(1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 24, 24, 32, 48)
    ]
    for n in range(1, 2000):
        assert n <= bucket(n) < max(1.5 * n, 2)
    fast, slow = fd.Sampler(den, (10, 1, 8, 8), run), fd.Sampler(den, (10, 1, 8, 8), fd.eager)
    cond = torch.arange(10)
    call = {"steps": 5, "seed": 2, "eta": 1.0, "guidance": fd.cfg(2.0)}
    whole = slow(cond=cond, **call)
    for n in (10, 5, 6, 9, 7, 1):
        got = fast(shape=(n, 1, 8, 8), cond=cond[:n], **call)
        assert got.shape == (n, 1, 8, 8)
        # another batch size is another order of sums in the matrix products
        assert (got - whole[:n]).norm() <= 1e-5 * whole[:n].norm()
        assert torch.equal(got, fast(shape=(n, 1, 8, 8), cond=cond[:n], **call))
    sizes = [held.state.x.shape[0] for held in fast._held.values()]
    assert sorted(sizes) == [1, 6, 8, 10]  # 9 went into 10
    with pytest.raises(ValueError, match="5 images"):
        fast(shape=(6, 1, 8, 8), steps=2, cond=cond[:5])


def test_each_and_errors_see_no_padding(den, run):
    fast = fd.Sampler(den, (8, 1, 8, 8), run)
    shapes = []

    def each(i, x, x0):
        shapes.append((x.shape[0], x0.shape[0]))
        return x

    fast(steps=3, shape=(5, 1, 8, 8), each=each)
    assert shapes == [(5, 5)] * 3

    def net(x, t, cond):
        return torch.where(x.abs().amax((1, 2, 3), keepdim=True) > 0, 0 * x, torch.nan)

    z = torch.ones(5, 1, 8, 8)
    z[4] = 0
    with pytest.raises(FloatingPointError, match=r"image 4 .* row 0 .* 1 of 5"):
        fd.Sampler(den.with_net(net), (8, 1, 8, 8), run)(shape=(5, 1, 8, 8), steps=2, x=z)


def test_the_set_of_buffers_not_used_for_longest_goes(den, run):
    fast = fd.Sampler(den, (4, 1, 8, 8), run, keep=2)
    for n in (4, 2, 4, 3):
        fast(steps=3, shape=(n, 1, 8, 8))
    four, two, three = FakeRecorder.all
    assert (len(four.living), len(two.living), len(three.living)) == (1, 0, 1)
    assert fast.memory == 2 * FakeRecorder.size
    fast(steps=3, shape=(2, 1, 8, 8))
    assert not four.living


def test_close_frees_all_and_the_sampler_begins_anew(den, run):
    with fd.Sampler(den, SHAPE, run) as fast:
        first = fast(steps=4)
        assert fast.memory == FakeRecorder.size
    (only,) = FakeRecorder.all
    assert not only.living
    assert only.released == 1
    assert fast.memory == 0
    assert not fast._held
    assert torch.equal(fast(steps=4), first)
    fd.sample(den, SHAPE, steps=4, run=run)
    assert not FakeRecorder.all[-1].living  # fd.sample keeps nothing


def test_a_sampler_that_is_forgotten_leaves_no_graph(den, run):
    fast = fd.Sampler(den, SHAPE, run)
    fast(steps=3)
    (held,) = fast._held.values()
    graph = weakref.ref(held.steps)
    del fast, held
    FakeRecorder.forget()
    gc.collect()
    assert graph() is None


def asking(net):
    def asks(x, t, cond):
        return net(x, t, cond) if bool(x.sum() < 1e9) else x

    return asks


class Failing(FakeRecorder):
    """A device whose captures fail for a reason that shows in the capture only."""

    def record(self, work):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")


def test_a_graph_that_cannot_be_names_the_op_and_the_line(den, run):
    fast = fd.Sampler(den.with_net(asking(den.net)), SHAPE, run)
    with pytest.raises(fd.CaptureError, match=r"aten._local_scalar_dense.*\(.*:\d+\) makes.*fd.eager") as caught:
        fast(steps=5)
    assert len(str(caught.value).splitlines()) == 1
    fast = fd.Sampler(den, SHAPE, fd.graph(recorder=Failing))
    with pytest.raises(fd.CaptureError, match=r"a previous error during capture; pass run=fd.eager"):
        fast(steps=5)


@pytest.mark.parametrize("recorder", [FakeRecorder, Failing])
def test_auto_falls_back_once_and_says_so(den, recorder):
    FakeRecorder.forget()
    net = asking(den.net) if recorder is FakeRecorder else den.net
    fast = fd.Sampler(den.with_net(net), SHAPE, fd.auto(recorder=recorder, worth=0))
    slow = fd.Sampler(den, SHAPE, fd.eager)
    call = {"solver": "heun", "steps": 5, "churn": 2.0, "cond": COND}
    with pytest.warns(UserWarning, match="the step cannot be captured") as said:
        got = fast(**call)
    assert len(said) == 1
    assert torch.equal(got, slow(**call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(**call), slow(**call))


def test_other_warnings_of_a_network_pass(den, run):
    def net(x, t, cond):
        warnings.warn("mind the gap", stacklevel=1)
        return den.net(x, t, cond)

    with pytest.warns(UserWarning, match="mind the gap"):
        fd.sample(den.with_net(net), SHAPE, steps=5, run=run)


def test_auto_takes_noise_of_the_callers_own_where_a_graph_cannot(den, run):
    noise = [torch.randn(SHAPE) for _ in range(5)]
    call = {"solver": "ddim", "eta": 1.0, "steps": 5}
    with pytest.raises(ValueError, match=r"run=fd\.eager"):
        fd.sample(den, SHAPE, noise=noise, run=run, **call)
    with pytest.raises(ValueError, match=r"run=fd\.eager"):
        fd.sample(den, SHAPE, noise=noise, run=fd.compiled, **call)
    wanted = fd.sample(den, SHAPE, noise=noise, run=fd.eager, **call)
    assert torch.equal(fd.sample(den, SHAPE, noise=noise, run=fd.auto(recorder=FakeRecorder), **call), wanted)
    assert torch.equal(fd.sample(den, SHAPE, noise=noise, **call), wanted)


def test_each_thread_warms_up_for_itself(den, run):
    """What cuDNN chose in one thread is not known in another: there, rows come before a capture again."""
    fast = fd.Sampler(den, SHAPE, run)
    fast(steps=2)
    (only,) = FakeRecorder.all
    assert (only.warmed, len(only.recordings)) == (2, 0)
    other = threading.Thread(target=lambda: fast(steps=3))
    other.start()
    other.join()
    assert (only.warmed, len(only.recordings)) == (4, 1)
    fast(steps=3)
    assert replays() == [[1 + 3]]


def test_a_capture_must_be_worth_it(den):
    FakeRecorder.forget()
    fast = fd.Sampler(den, SHAPE, fd.auto(recorder=FakeRecorder))
    fast(steps=6)
    assert replays() == [[]]
    fast(steps=6)
    assert replays() == [[6]]
    FakeRecorder.forget()
    fd.sample(den, SHAPE, steps=9, run=fd.auto(recorder=FakeRecorder))
    assert replays() == [[7]]


def test_a_row_that_raised_is_no_warm_up(den, run):
    fail = [True, True]

    def net(x, t, cond):
        if fail and fail.pop():
            raise ZeroDivisionError
        return den.net(x, t, cond)

    fast = fd.Sampler(den.with_net(net), SHAPE, run)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fast(steps=4)
    assert torch.equal(fast(steps=4), fd.sample(den, SHAPE, steps=4, run=fd.eager))
    assert replays() == [[2]]


def test_the_op_is_looked_for_without_a_trace(den, run):
    """x0 of the watched row, and the counter at the last line of the buffer, are as if nobody had looked."""
    seen = ([], [])
    net = asking(den.net)
    for n, given in enumerate((fd.auto(recorder=FakeRecorder, worth=0), fd.eager)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = {"steps": 63, "each": lambda i, x, x0, n=n: seen[n].append((x, x0))}
            fd.sample(den.with_net(net), SHAPE, "ddim", run=given, **call)
    assert len(seen[0]) == 63
    assert all(torch.equal(a, b) for one, two in zip(*seen, strict=True) for a, b in zip(one, two, strict=True))


def test_noise_of_the_callers_own_for_a_padded_batch(den):
    noise = [torch.randn(5, 1, 8, 8) for _ in range(4)]
    auto = fd.auto(recorder=FakeRecorder)._replace(static=lambda device: True)
    fast = fd.Sampler(den, (8, 1, 8, 8), auto)
    given = {"steps": 4, "eta": 1.0, "seed": 1}
    got = fast("ddim", shape=(5, 1, 8, 8), noise=noise, **given)
    wanted = fd.sample(den, (5, 1, 8, 8), "ddim", noise=noise, run=fd.eager, **given)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_newer_names_of_the_precisions(den, run):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        fd.sample(den, SHAPE, steps=4, run=run)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_call_from_inside_a_call_is_refused(den, run):
    fast = fd.Sampler(den, SHAPE, run)
    with pytest.raises(RuntimeError, match="within its own call"):
        fast(steps=3, each=lambda i, x, x0: fast(steps=1))
    assert fast(steps=3).isfinite().all()


def test_mistakes(den):
    with pytest.raises(ValueError, match="captures CUDA graphs and the network is on cpu"):
        fd.sample(den, SHAPE, steps=2, run=fd.graph)
    with pytest.raises(ValueError, match="unroll=0"):
        fd.sample(den, SHAPE, steps=2, run=fd.graph(unroll=0, recorder=FakeRecorder))
    with pytest.raises(TypeError, match="unknown option 'speed'"):
        fd.sample(den, SHAPE, steps=2, run=fd.compiled(speed=9))
    with pytest.raises(TypeError, match=r"unknown option 'speed'.*unroll"):
        fd.sample(den, SHAPE, steps=2, run=fd.auto(speed=9))
    with pytest.raises(TypeError, match=r"unknown option 'speed'.*none"):
        fd.sample(den, SHAPE, steps=2, run=fd.eager(speed=9))
    with pytest.raises(TypeError, match=r"pass fd.auto, fd.eager"):
        fd.Sampler(den, SHAPE, run="graph")
    with pytest.raises(ValueError, match="keep=0"):
        fd.Sampler(den, SHAPE, keep=0)
    assert repr(fd.graph(unroll=2)) == "fd.graph(unroll=2)"
