"""run=fd.graph and run=fd.auto: what is captured when, what is dropped when, on a recorder that replays by calling."""

import gc
import warnings

import pytest
import torch

import fastdiff as fd
from fastdiff.sampling.graph import Weights
from fastdiff.sampling.sampler import bucket
from fastdiff.sampling.state import Kind
from tests.sampling.foreign import ForeignUNet
from tests.sampling.recorder import FakeRecorder

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 1, 8, 8)
COND = torch.tensor([3, 1, 4, 1])


@pytest.fixture
def den():
    torch.manual_seed(0)
    return fd.Denoiser(ForeignUNet().eval(), fd.linear(), "eps", null=lambda c: torch.full_like(c, 10))


@pytest.fixture
def run():
    FakeRecorder.forget()
    return fd.graph(recorder=FakeRecorder)


def replays():
    """Replays of each graph, by recorder, in the order of their capture."""
    return [[r.replays for r in recorder.recordings] for recorder in FakeRecorder.all]


CALLS = [
    {"solver": "ddim", "steps": 7, "seed": 3},
    {"solver": "ddim", "steps": 5, "eta": 1.0, "seed": 4, "clip": 1.0},
    {"solver": "heun", "steps": 6, "churn": 3.0, "seed": 5, "t_end": 0.0},
    {"solver": "dpmpp_3m_sde", "steps": 11, "seed": 2**63, "index": [7, 0, 2**40, 3]},
    {"solver": "ddpm", "times": [0.999, 0.7, 0.4, 0.1, 0.003, 0.0], "seed": 1},
]


def test_a_graph_is_the_eager_loop_bit_for_bit_and_captured_once(den, run):
    continuous = fd.Denoiser(den.net, fd.vp(), "eps")
    fast, slow = fd.Sampler(continuous, SHAPE, run), fd.Sampler(continuous, SHAPE, fd.eager)
    for call in CALLS:
        assert torch.equal(fast(cond=COND, **call), slow(cond=COND, **call))
    (only,) = FakeRecorder.all
    # rows of a plan: one a step, two a step of heun but the last; the first two rows of all came before the capture
    assert only.warmed == 2
    assert replays() == [[7 + 5 + (2 * 6 - 1) + 11 + 5 - 2]]


def test_whole_steps_are_told_as_integers_and_others_as_they_are(den, run):
    """So a network of somebody else's on a discrete schedule has two graphs, ours, which reads a table, one."""
    ours = fd.Denoiser(fd.UNet(in_channels=1, channels=8, mults=(1, 2), blocks=1, attention=()).eval(), fd.linear())
    for model, sets in ((den, 2), (ours, 1)):
        FakeRecorder.forget()
        fast, slow = fd.Sampler(model, SHAPE, run), fd.Sampler(model, SHAPE, fd.eager)
        for call in ({"solver": "ddim"}, {"solver": "heun", "churn": 3.0}, {"solver": "euler"}):
            assert torch.equal(fast(steps=5, **call), slow(steps=5, **call))
        assert len(FakeRecorder.all) == sets


def test_guidance_is_a_second_graph_and_its_interval_a_third_of_the_same_buffers(den, run):
    fast, slow = fd.Sampler(den, SHAPE, run), fd.Sampler(den, SHAPE, fd.eager)
    for w in (2.0, 3.5, 0.0):
        call = {"steps": 6, "cond": COND, "guidance": fd.cfg(w)}
        assert torch.equal(fast(**call), slow(**call))
    assert replays() == [[3 * 6 - 2]]
    call = {"steps": 8, "cond": COND, "guidance": fd.cfg(2.0, between=(0.5, 5.0))}
    for _ in range(2):
        assert torch.equal(fast(**call), slow(**call))
    rows = fd.plan(fd.linear(), "eps", fd.ddim, steps=8, w=call["guidance"].weight)[:-1]
    halves = int((rows[:, fd.row.W] != 1).sum())
    assert 0 < halves < 8
    assert replays() == [[3 * 6 - 2 + 2 * halves, 2 * (8 - halves) - 2]]
    assert len(FakeRecorder.all) == 1


def test_unrolling(den):
    FakeRecorder.forget()
    fast = fd.Sampler(den, SHAPE, fd.graph(unroll=4, recorder=FakeRecorder))
    slow = fd.Sampler(den, SHAPE, fd.eager)
    for steps in (14, 4, 3):
        call = {"solver": "dpmpp_2m", "steps": steps, "seed": 6}
        assert torch.equal(fast(**call), slow(**call))
    # 2 + 3 * 4 rows, then 4, then 3
    assert replays() == [[3 + 1, 3]]
    (held,) = fast._held.values()
    assert held.steps.captured == [(Kind(4), 4), (Kind(4), 1)]


def test_each_and_progress_look_between_replays(den, run, capsys):
    fast, slow = fd.Sampler(den, SHAPE, run), fd.Sampler(den, SHAPE, fd.eager)
    seen = ([], [])

    def watch(into):
        def each(i, x, x0):
            into.append((i, x, x0))
            return x + 0.01 if i == 2 else None

        return each

    a, b = (f("heun", steps=5, cond=COND, each=watch(s)) for f, s in zip((fast, slow), seen, strict=True))
    assert torch.equal(a, b)
    assert len(seen[0]) == 5
    for (i, x, x0), (j, y, y0) in zip(*seen, strict=True):
        assert i == j
        assert torch.equal(x, y)
        assert torch.equal(x0, y0)
    # stages are not watched: two kinds of rows, each of them warmed up and captured
    assert FakeRecorder.all[0].warmed == 4
    assert sorted(replays()[0]) == [4 - 2, 5 - 2]
    assert torch.equal(fast("ddim", steps=4, progress=True), slow("ddim", steps=4))


def test_results_are_copies(den, run):
    fast = fd.Sampler(den, SHAPE, run)
    a = fast(steps=4, seed=1)
    kept = a.clone()
    fast(steps=4, seed=2)
    assert torch.equal(a, kept)


def test_weights_that_change_in_place_are_read_and_weights_that_move_are_captured_anew(den, run):
    fast, slow = fd.Sampler(den, SHAPE, run), fd.Sampler(den, SHAPE, fd.eager)
    fast(steps=4)
    with torch.no_grad():
        for p in den.net.parameters():
            p.mul_(0.9)
    assert torch.equal(fast(steps=4), slow(steps=4))
    assert replays() == [[2 + 4]]
    state = {name: p * 0.8 for name, p in den.net.state_dict().items()}
    den.net.load_state_dict(state, assign=True)
    assert torch.equal(fast(steps=4), slow(steps=4))
    (only,) = FakeRecorder.all
    assert replays() == [[6, 2]]
    assert [r.work is None for r in only.recordings] == [True, False]
    assert only.released == 1
    den.net.bfloat16()
    fast(steps=4)
    assert len(FakeRecorder.all) == 2  # another input dtype: other buffers


def test_a_prepared_network_is_packed_again_in_place_and_the_graph_stays(run):
    torch.manual_seed(0)
    net = fd.UNet(in_channels=1, channels=8, mults=(1, 2), blocks=1, attention=(), classes=4).eval()
    torch.nn.init.normal_(net.out.weight, std=0.02)
    den = fd.Denoiser(net, fd.linear(), "eps").prepare(dtype=torch.bfloat16)
    fast, slow = fd.Sampler(den, SHAPE, run), fd.Sampler(den, SHAPE, fd.eager)
    call = {"steps": 5, "cond": torch.tensor([0, 1, 2, 3]), "guidance": fd.cfg(2.0)}
    first = fast(**call)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    second = fast(**call)
    assert torch.equal(second, slow(**call))
    assert not torch.equal(second, first)
    assert replays() == [[2 * 5 - 2]]
    assert den.channels_last
    assert not fd.Denoiser(net, fd.linear()).channels_last


def test_what_decides_the_kernels_is_captured_anew(den, run):
    fast = fd.Sampler(den, SHAPE, run)
    fast(steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        fast(steps=3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before != "medium" else "highest")
    try:
        fast(steps=3)
    finally:
        torch.set_float32_matmul_precision(before)
    assert replays() == [[1, 1, 1]]
    with fd.backend(fd.ops.dispatch.chosen("step_")):  # by name, where it was by itself
        fast(steps=3)
    assert replays() == [[1, 1, 1], [1]]
    assert torch.backends.cudnn.benchmark is False


def test_autocast_keeps_no_copies_that_a_graph_would_read(den, run):
    kept = []

    def net(x, t, cond):
        kept.append(torch.is_autocast_cache_enabled())
        return den.net(x, t, cond)

    with torch.autocast("cpu", torch.bfloat16):
        fd.sample(den.with_net(net), SHAPE, steps=4, run=run)
        assert torch.is_autocast_cache_enabled()
    assert kept == [False] * 4


@pytest.mark.parametrize("run", [fd.eager, fd.graph(recorder=FakeRecorder)], ids=["eager", "graph"])
def test_calls_in_and_out_of_inference_mode(den, run):
    fast = fd.Sampler(den, SHAPE, run)
    call = {"solver": "heun", "steps": 4, "seed": 1, "cond": COND, "x": torch.randn(SHAPE)}
    wanted = fast(**call)
    for inside in (fast, fd.Sampler(den, SHAPE, run)):
        with torch.inference_mode():
            assert torch.equal(inside(**call | {"x": call["x"] * 1, "cond": COND * 1}), wanted)
        assert torch.equal(inside(**call), wanted)


def test_a_module_put_in_anothers_place_is_seen():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU())
    weights = Weights(net)
    first = weights.signature()
    assert weights.signature() == first
    net[1] = torch.nn.ReLU()
    assert weights.signature() != first


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


def test_a_graph_that_the_garbage_collector_meets(den, run):
    fast = fd.Sampler(den, SHAPE, run)
    fast(steps=3)
    del fast
    gc.collect()


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
    fast = fd.Sampler(den.with_net(net), SHAPE, fd.auto(recorder=recorder))
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


def test_mistakes(den):
    with pytest.raises(ValueError, match="captures CUDA graphs and the network is on cpu"):
        fd.sample(den, SHAPE, steps=2, run=fd.graph)
    with pytest.raises(ValueError, match="unroll=0"):
        fd.sample(den, SHAPE, steps=2, run=fd.graph(unroll=0, recorder=FakeRecorder))
    with pytest.raises(TypeError, match="unknown option 'speed'"):
        fd.sample(den, SHAPE, steps=2, run=fd.compiled(speed=9))
    with pytest.raises(TypeError, match=r"pass fd.auto, fd.eager"):
        fd.Sampler(den, SHAPE, run="graph")
    with pytest.raises(ValueError, match="keep=0"):
        fd.Sampler(den, SHAPE, keep=0)
    assert repr(fd.graph(unroll=2)) == "fd.graph(unroll=2)"
