"""run=fd.graph and run=fd.auto: what is captured when, what is dropped when, on a recorder that replays by calling."""

import pytest
import torch

import fastdiff as fd
from fastdiff.sampling.state import Kind, Program
from fastdiff.sampling.surroundings import Weights
from tests.sampling.recorder import FakeRecorder, replays

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 1, 8, 8)
COND = torch.tensor([3, 1, 4, 1])


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


def test_the_weights_of_a_classifier_are_watched_too(den, run):
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 5)).train()

    class Judge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = judge

        def forward(self, x, t):
            return self.net(x)

    net = Judge().train()
    fast, slow = fd.Sampler(den, SHAPE, run), fd.Sampler(den, SHAPE, fd.eager)
    call = {"steps": 4, "guidance": fd.classifier(net, 2.0, labels=COND)}
    first = fast(**call)
    assert torch.equal(fast(**call), first)  # no dropout
    assert net.training
    judge.load_state_dict({name: 2 * p for name, p in judge.state_dict().items()}, assign=True)
    assert torch.equal(fast(**call), slow(**call))
    assert replays() == [[6, 2]]


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


def test_autocast_keeps_no_copies_that_a_graph_would_read(den):
    kept = []

    class Recorder(FakeRecorder):
        def warm(self, work):
            kept.append(torch.is_autocast_cache_enabled())
            super().warm(work)

        def record(self, work):
            kept.append(torch.is_autocast_cache_enabled())
            return super().record(work)

    with torch.autocast("cpu", torch.bfloat16):
        fd.sample(den, SHAPE, steps=4, run=fd.graph(recorder=Recorder))
        assert torch.is_autocast_cache_enabled()
    assert kept == [False] * 3


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
    weights = Weights(Program(net, None, None))
    first = weights.signature()
    assert weights.signature() == first
    net[1] = torch.nn.ReLU()
    assert weights.signature() != first
