"""run=fd.compiled: one compilation for everything that is a number, with real code generation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff as fd
from fastdiff.ops import philox
from fastdiff.sampling.sampler import Sampler

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]

SHAPE = (3, 2, 8, 8)
COND = torch.tensor([1, 0, 2])


@pytest.fixture(scope="module")
def den():
    torch.manual_seed(0)
    net = fd.UNet(in_channels=2, channels=8, mults=(1,), blocks=1, attention=(), classes=4).eval()
    # small weights at the end: a smooth network, whose loop does not amplify rounding
    torch.nn.init.normal_(net.out.weight, std=0.02)
    return fd.Denoiser(net, fd.linear(), "eps")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    return CompileCounterWithBackend("inductor")


def near(a, b, limit):
    return float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


PLAIN = [
    {"solver": solver, "steps": steps, "clip": clip, "seed": seed, **options}
    for solver, options in (("ddim", {"eta": 1.0}), ("dpmpp_3m_sde", {}), ("heun", {"churn": 2.0}))
    for steps, clip, seed in ((5, 1.0, 1), (11, float("inf"), 2**63), (21, 2.0, 3))
]


def test_one_compilation_for_every_solver_and_a_second_for_guidance(den, counter):
    """{ddim, 3M SDE, Heun} x {5, 11, 21 steps} x clip x seed, then x weight; each is the eager loop to 1e-5."""
    fast, slow = Sampler(den, SHAPE, fd.compiled(backend=counter)), Sampler(den, SHAPE, fd.eager)
    for call in PLAIN:
        assert near(fast(cond=COND, **call), slow(cond=COND, **call), 1e-5)
    assert counter.frame_count == 1
    for w, plain in zip((2.0, 0.0, 3.5, 1.5) * 3, PLAIN, strict=False):
        call = plain | {"cond": COND.flip(0), "guidance": fd.cfg(w)}
        assert near(fast(**call), slow(**call), 1e-5)
    assert counter.frame_count == 2
    # another sampler of the same network and shape finds both
    again = Sampler(den, SHAPE, fd.compiled(backend=counter))
    again("dpmpp_2m", steps=9, cond=COND)
    again("euler", steps=3, cond=COND, guidance=fd.cfg(4.0))
    assert counter.frame_count == 2


def test_one_step_to_1e_6_and_the_noise_bit_for_bit(den, counter):
    fast, slow = (Sampler(den, SHAPE, run) for run in (fd.compiled(backend=counter), fd.eager))
    for call in ({"seed": 5}, {"seed": 6, "eta": 1.0}):
        step = {"times": [700, 600], "cond": COND, **call}
        assert near(fast("ddim", **step), slow("ddim", **step), 1e-6)
    # a network that says nothing, a table that keeps nothing: x is the noise
    rows = fd.plan(den.schedule, "eps", fd.ddim, times=[700, 600], eta=1.0)
    nothing = fd.Denoiser(lambda x, t, cond: 0 * x, fd.linear(), "eps")
    zero = torch.zeros(SHAPE)
    got = fd.sample(nothing, SHAPE, "ddim", times=[700, 600], eta=1.0, x=zero, seed=6, run=fd.compiled(backend=counter))
    z = philox.normal(philox.seed_tensor(6), torch.arange(3), 0, philox.STEP, SHAPE[1:])
    want = fd.sample(nothing, SHAPE, "ddim", times=[700, 600], eta=1.0, x=zero, seed=6, run=fd.eager)
    assert torch.equal(got, want)
    assert near(got, float(rows[0, fd.row.S]) * z, 1e-6)


def test_what_is_no_number_does_recompile(den, counter):
    """The counter counts: the same loop with the row's number in Python is compiled again for each row."""
    rows = torch.as_tensor(fd.plan(den.schedule, "eps", fd.ddim, steps=4)).float()

    @torch.compile(fullgraph=True, dynamic=False, backend=counter)
    def step(x, k):
        return rows[k][fd.row.A] * x

    for k in range(3):
        step(torch.ones(3), k)
    assert counter.frame_count == 3
    fast = Sampler(den, SHAPE, fd.compiled(backend=CompileCounterWithBackend("eager")))
    fast(steps=2, cond=COND)
    other = fast.run.options["backend"]
    fast(steps=2, cond=COND[:2], shape=(2, *SHAPE[1:]))
    assert other.frame_count == 2


def test_weights_that_change_are_used(den, counter):
    fast, slow = Sampler(den, SHAPE, fd.compiled(backend=counter)), Sampler(den, SHAPE, fd.eager)
    fast(steps=3, cond=COND)
    with torch.no_grad():
        for p in den.net.parameters():
            p.mul_(1.01)
    assert near(fast(steps=3, cond=COND), slow(steps=3, cond=COND), 1e-5)
    assert counter.frame_count == 1


def test_more_shapes_than_dynamo_allows_for_one_function():
    """Capacities, dtypes of the times, forms of the condition: each has a function of its own."""
    den = fd.Denoiser(lambda x, t, c: x / (1 + t[:, None, None, None]), fd.linear(), "eps")
    torch._dynamo.reset()
    fast = Sampler(den, (1, 1, 2, 2), fd.compiled(backend="eager"))
    for steps in (5, 100, 400):
        for solver in ("ddim", "heun"):
            for cond in (None, torch.zeros(1), torch.zeros(1, 2), [torch.zeros(1), torch.zeros(1)]):
                fast(solver, steps=steps, cond=cond, churn=1.0) if solver == "heun" else fast(steps=steps, cond=cond)


def test_each_is_a_compilation_of_its_own(den):
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    seen = []
    fast = Sampler(den, SHAPE, fd.compiled(backend=counter))
    slow = Sampler(den, SHAPE, fd.eager)
    wanted = slow("heun", steps=4, cond=COND, each=lambda i, x, x0: seen.append(x0))
    got = fast("heun", steps=4, cond=COND, each=lambda i, x, x0: seen.append(x0))
    assert near(got, wanted, 1e-5)
    for a, b in zip(seen[:4], seen[4:], strict=True):
        assert near(b, a, 1e-5)
    assert counter.frame_count == 2  # rows that somebody looks at, and stages


@pytest.mark.parametrize("energy", [False, True], ids=["plain", "steered"])
def test_x0_is_of_the_x_that_the_row_received(energy):
    """A pointwise network, which Inductor could compute again, and the arithmetic of x0, behind the step in place."""
    den = fd.Denoiser(lambda x, t, cond: 0.3 * x + 0.1, fd.cosine(), "v")
    torch._dynamo.reset()
    steer = {"guidance": fd.energy(lambda x0, t, cond: x0.square().flatten(1).sum(1), 0.1)} if energy else {}

    def seen(run):
        shown = []
        fd.sample(den, (2, 1, 4, 4), steps=4, clip=1.0, run=run, each=lambda i, x, x0: shown.append((x, x0)), **steer)
        return shown

    for (x, x0), (y, y0) in zip(seen(fd.eager), seen(fd.compiled), strict=True):
        assert near(y, x, 1e-6)
        assert near(y0, x0, 1e-6)
