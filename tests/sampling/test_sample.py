"""fd.sample on networks of others: loops in float64, noise, guidance, hooks, mistakes."""

import math
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import row
from fastdiff.ops import philox
from tests.sampling.foreign import ForeignUNet

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = [
    ("ddim", {}),
    ("ddim", {"eta": 0.7}),
    ("ddim", {"eta": 1.0, "clipped_direction": False}),
    ("ddpm", {}),
    ("ddpm", {"variance": "beta"}),
    ("euler", {}),
    ("euler", {"churn": 4.0}),
    ("heun", {}),
    ("heun", {"churn": 4.0}),
    ("dpmpp_2m", {}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.0, "corrected": True}),
]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return ForeignUNet().eval()


@pytest.fixture
def den(net):
    return fd.Denoiser(net, fd.linear(), "eps", null=lambda c: torch.full_like(c, 10))


def by_hand(den, rows, x, seed, cond=None, null=None):
    """The whole loop in float64, written from DESIGN's formula with no fastdiff code but the rows and the noise."""
    h = [torch.zeros_like(x)] * 3
    index, key = torch.arange(len(x)), philox.seed_tensor(seed)
    for k, r in enumerate(rows[:-1]):
        c = dict(zip(row.NAMES, r.tolist(), strict=True))
        t = torch.full((len(x),), c["T"])  # a network is told float32 times
        with torch.no_grad():
            F = den.net(c["C_IN"] * x, t, cond)
            if c["W"] != 1:
                u = den.net(c["C_IN"] * x, t, null)
                F = u + c["W"] * (F - u)
        x0 = (c["C_SKIP"] * x + c["C_OUT"] * F).clamp(-c["CLIP"], c["CLIP"])
        y = c["A"] * x + c["B0"] * x0 + c["BF"] * F + c["B1"] * h[0] + c["B2"] * h[1] + c["B3"] * h[2]
        if c["S"]:
            y = y + c["S"] * philox.normal(key, index, k, 1, x.shape[1:], torch.float64)
        if c["P"] or c["Q"]:
            h[int(c["SLOT"])] = c["P"] * x + c["Q"] * x0
        x = y
    return x


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("w", [1.0, 2.5])
def test_loops_against_float64(den, solver, options, w):
    steps, seed, cond = 7, 5, torch.tensor([3, 1, 4])
    wide = den.with_net(ForeignUNet().double())
    wide.net.load_state_dict(den.net.state_dict())
    guidance = None if w == 1 else fd.cfg(w)
    rows = fd.plan(den.schedule, "eps", fd.SOLVERS[solver], steps=steps, clip=1.0, w=w, **options)
    x = philox.normal(philox.seed_tensor(seed), torch.arange(3), 0, 0, (1, 8, 8), torch.float64)
    wanted = by_hand(wide, rows, x, seed, cond, torch.full_like(cond, 10))
    args = {"steps": steps, "seed": seed, "cond": cond, "guidance": guidance, "clip": 1.0, **options}
    exact = fd.Sampler(wide, (3, 1, 8, 8), dtype=torch.float64)(solver, **args)
    assert exact.dtype == torch.float64
    assert (exact - wanted).abs().max() <= 1e-12
    growth = max(1.0, (rows[1:, row.ALPHA] / rows[:-1, row.ALPHA]).max())
    for backend in ("reference", "auto"):
        with fd.backend(backend):
            got = fd.sample(den, (3, 1, 8, 8), solver, **args)
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() <= 1e-5 * growth


@pytest.mark.parametrize("solver", ["ddpm", "heun"])
def test_an_image_is_its_own_whatever_the_batch(solver):
    """With a network that treats images alone to the last bit, batch 64 and batch 1 give equal bytes."""
    den = fd.Denoiser(lambda x, t, c: 0.1 * x + 0.3, fd.cosine(), "eps")
    many = fd.sample(den, (64, 3, 32, 32), solver, steps=3, seed=9)
    for n in (0, 37, 63):
        one = fd.sample(den, (1, 3, 32, 32), solver, steps=3, seed=9, index=[n])
        assert torch.equal(one[0], many[n])
    parts = [fd.sample(den, (16, 3, 32, 32), solver, steps=3, seed=9, index=range(i, i + 16)) for i in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts), many)


def test_a_sampler_is_used_again_with_everything_changed(den):
    fast = fd.Sampler(den, (2, 1, 8, 8))
    cond = torch.tensor([1, 2])
    calls = [
        ("heun", {"steps": 4, "seed": 1}),
        ("ddpm", {"steps": 9, "seed": 2, "cond": cond, "guidance": fd.cfg(3.0)}),
        ("dpmpp_2m", {"steps": 5, "seed": 3, "cond": cond}),
        ("dpmpp_3m_sde", {"steps": 6, "seed": 5, "cond": cond}),
        ("ddim", {"steps": 70, "seed": 4, "eta": 0.5}),
    ]
    first = [fast(solver, **args) for solver, args in calls]
    kept = [x.clone() for x in first]
    for (solver, args), x in zip(reversed(calls), reversed(first), strict=True):
        assert torch.equal(fast(solver, **args), x)
        assert torch.equal(fd.sample(den, (2, 1, 8, 8), solver, **args), x)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_threads_share_a_sampler(den):
    fast = fd.Sampler(den, (2, 1, 8, 8))
    wanted = [fast("ddpm", steps=10, seed=s) for s in range(6)]
    got = [None] * 6

    def work(s):
        got[s] = fast("ddpm", steps=10, seed=s)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_guidance_interval_runs_one_half_outside(den):
    sizes = []

    def net(x, t, cond):
        sizes.append(len(x))
        return den.net(x, t, cond)

    counted = den.with_net(net)
    rows = fd.plan(den.schedule, "eps", fd.ddim, steps=10, w=fd.cfg(2.0, between=(0.3, 3.0)).weight)
    cond = torch.tensor([1, 2])
    x = fd.sample(counted, (2, 1, 8, 8), steps=10, cond=cond, guidance=fd.cfg(2.0, between=(0.3, 3.0)))
    assert sizes == [2 if w == 1 else 4 for w in rows[:-1, row.W]]
    assert 0 < sizes.count(4) < 10
    wide = den.with_net(ForeignUNet().double())
    wide.net.load_state_dict(den.net.state_dict())
    start = philox.normal(philox.seed_tensor(0), torch.arange(2), 0, 0, (1, 8, 8), torch.float64)
    wanted = by_hand(wide, rows, start, 0, cond, torch.full_like(cond, 10))
    growth = (rows[1:, row.ALPHA] / rows[:-1, row.ALPHA]).max()
    assert (x - wanted).abs().max() <= 1e-6 * growth * wanted.abs().max()


def test_conditions_of_every_shape(den):
    cond = torch.tensor([4, 7])

    def nested(x, t, c):
        return den.net(x, t, c["a"][0] if isinstance(c, dict) else c)

    other = fd.Denoiser(nested, den.schedule, "eps", null=lambda c: {"a": (torch.full_like(c["a"][0], 10), c["a"][1])})
    args = {"steps": 4, "guidance": fd.cfg(2.0)}
    wanted = fd.sample(den, (2, 1, 8, 8), cond=cond, **args)
    assert torch.equal(fd.sample(other, (2, 1, 8, 8), cond={"a": (cond, torch.zeros(2, 3))}, **args), wanted)
    assert torch.equal(fd.sample(den, (2, 1, 8, 8), cond=[4, 7], **args), wanted)
    three = fd.sample(den, (2, 1, 8, 8), cond=4, steps=4)
    assert torch.equal(three, fd.sample(den, (2, 1, 8, 8), cond=torch.tensor([4, 4]), steps=4))
    assert torch.equal(
        fd.sample(den, (2, 1, 8, 8), cond=range(4, 6), steps=4), fd.sample(den, (2, 1, 8, 8), cond=[4, 5], steps=4)
    )


def test_each_sees_every_grid_step_and_may_replace_x(den):
    seen = []

    def look(i, x, x0):
        seen.append((i, x, x0))

    x = fd.sample(den, (2, 1, 8, 8), "heun", steps=5, each=look, clip=1.0)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], x)
    # the last row of heun is x' = x0
    assert (seen[-1][2] - x).abs().max() <= 1e-6
    assert all(x0.abs().max() <= 1 for _, _, x0 in seen)
    assert torch.equal(x, fd.sample(den, (2, 1, 8, 8), "heun", steps=5, clip=1.0))
    # what a hook returns goes on: replacing x by the state of another run continues that run
    other = []
    final = fd.sample(den, (2, 1, 8, 8), steps=5, seed=8, each=lambda i, x, x0: other.append(x))
    mixed = fd.sample(den, (2, 1, 8, 8), steps=5, seed=1, each=lambda i, x, x0: other[2] if i == 2 else None)
    assert torch.equal(mixed, final)


def test_x_and_times_go_on_from_a_state(den):
    middle = []
    full = fd.sample(den, (2, 1, 8, 8), steps=6, each=lambda i, x, x0: middle.append(x))
    rows = fd.plan(den.schedule, "eps", fd.ddim, steps=6)
    times = [*rows[2:-1, row.T], -1]
    assert (fd.sample(den, (2, 1, 8, 8), times=times, x=middle[1]) - full).abs().max() <= 1e-6


def test_given_noise_is_used_row_by_row(den):
    rows = fd.plan(den.schedule, "eps", fd.ddpm, steps=6)
    key, index = philox.seed_tensor(3), torch.arange(2)
    z = [philox.normal(key, index, k, 1, (1, 8, 8)) for k in range(6) if rows[k, row.S] != 0]
    a = fd.sample(den, (2, 1, 8, 8), "ddpm", steps=6, seed=3)
    b = fd.sample(den, (2, 1, 8, 8), "ddpm", steps=6, seed=3, noise=z)
    assert len(z) == 5
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("schedule", [fd.cosine(), fd.vp(), fd.linear(T=100)])
def test_a_perfect_network_returns_the_image(schedule, predicts):
    """A network that knows the one image of its data set: every prediction kind must end at it."""
    image = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)

    def net(x, t, cond):
        time = t.double().numpy()
        alpha, sigma = (torch.tensor(f(time)).float().reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        eps = (x - alpha * image) / sigma
        return {"eps": eps, "x0": image.expand_as(x), "v": alpha * eps - sigma * image, "score": -eps / sigma}[predicts]

    den = fd.Denoiser(net, schedule, predicts)
    for solver in ("ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_3m_sde"):
        x = fd.sample(den, (3, 1, 4, 4), solver, steps=20)
        last = float(schedule.sigma(np.array([schedule.t_end]))[0]) if schedule.T is None else 0.0
        assert (x - image).abs().max() <= 5 * last + 2e-3
        t = 0.5 if schedule.T is None else 50
        assert (den.x0(x, t) - image).abs().max() <= 1e-4


def test_learned_variance_uses_the_second_half():
    """v = +1 is beta, v = -1 is beta tilde: the two fixed variances of ddpm."""
    base = lambda x, t, cond: 0.2 * x  # noqa: E731
    for v, variance in ((1.0, "beta"), (-1.0, "beta_tilde")):
        net = lambda x, t, cond, v=v: torch.cat([base(x, t, cond), torch.full_like(x, v)], 1)  # noqa: E731
        learned = fd.Denoiser(net, fd.cosine(), "eps+range")
        fixed = fd.Denoiser(base, fd.cosine(), "eps")
        a = fd.sample(learned, (2, 1, 4, 4), "ddpm", steps=8, variance="learned_range", clip=1.0)
        b = fd.sample(fixed, (2, 1, 4, 4), "ddpm", steps=8, variance=variance, clip=1.0)
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_sampling_turns_dropout_off_and_back_on(den):
    net = torch.nn.Sequential(torch.nn.Dropout(0.5))

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t, cond=None):
            return self.inner(x)

    noisy = fd.Denoiser(Wrapped().train(), fd.cosine(), "eps")
    assert torch.equal(fd.sample(noisy, (1, 1, 4, 4), steps=3), fd.sample(noisy, (1, 1, 4, 4), steps=3))
    assert noisy.net.training


def test_no_device_value_is_read_inside_the_loop(den):
    """Twice the rows turn no more tensors into numbers; a network that does is seen."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            return func(*args, **(kwargs or {}))

    def reads(net, steps):
        fast = fd.Sampler(den.with_net(net), (2, 1, 8, 8))
        with Reads() as mode:
            fast("ddim", steps=steps)
        return mode.count

    def asks(x, t, cond):
        return den.net(x, t, cond) if bool(x.sum() < 1e9) else x

    assert reads(den.net, 20) == reads(den.net, 40)
    assert reads(asks, 40) == reads(asks, 20) + 20


def test_nan_names_image_row_and_time(den):
    def net(x, t, cond):
        F = den.net(x, t, cond).clone()
        F[1][t[1] < 500] = math.nan
        return F

    with pytest.raises(FloatingPointError, match=r"image 11 is not finite after row 5 \(t = 499\)"):
        fd.sample(den.with_net(net), (3, 1, 8, 8), steps=10, index=[10, 11, 12])


MISTAKES = [
    ({"solver": "ddjm"}, "solver='ddjm' is unknown; accepted: "),
    ({"steps": 0}, "steps"),
    ({"steps": -3}, "steps"),
    ({"spacing": "cubic"}, "cubic"),
    ({"etta": 0.3}, "eta"),
    ({"guidance": fd.cfg(2.0)}, "guidance needs a condition"),
    ({"cond": torch.tensor([1, 2, 3])}, "cond holds 3 images"),
    ({"x": torch.zeros(2, 1, 4, 4)}, "x must be shaped"),
    ({"index": [1]}, "index must be 2 whole numbers"),
    ({"index": [1, -1]}, "index must be 2 whole numbers"),
    ({"index": [0.5, 1.0]}, "index must be 2 whole numbers"),
    ({"seed": 2**64}, "64 bits"),
    ({"seed": 1.5}, "64 bits"),
    ({"w": 2.0}, r"guidance=fd\.cfg\(w\)"),
    ({"solver": "ddpm", "noise": []}, "the iterator ended before row 0"),
    ({"each": lambda i, x, x0: x[:1]}, "each returned"),
]


@pytest.mark.parametrize(("wrong", "says"), MISTAKES)
def test_mistakes_get_a_sentence(den, wrong, says):
    with pytest.raises(ValueError, match=says):
        fd.sample(den, (2, 1, 8, 8), **wrong)


def test_null_conditions(den):
    """A null of one image stands for all; a null built otherwise, and a condition that is no tensor, are named."""
    args = {"cond": [1, 2], "steps": 3}
    wanted = fd.sample(den, (2, 1, 8, 8), guidance=fd.cfg(2.0), **args)
    for null in (10, torch.tensor(10), torch.tensor([10]), [10, 10], lambda c: torch.full_like(c, 10)):
        assert torch.equal(fd.sample(den, (2, 1, 8, 8), guidance=fd.cfg(2.0, null=null), **args), wanted)
    with pytest.raises(ValueError, match="cond holds 3 images"):
        fd.sample(den, (2, 1, 8, 8), guidance=fd.cfg(2.0, null=torch.tensor([1, 2, 3])), **args)
    with pytest.raises(ValueError, match="not built like the condition"):
        fd.sample(den, (2, 1, 8, 8), guidance=fd.cfg(2.0, null={"y": torch.tensor([10])}), **args)
    with pytest.raises(TypeError, match="cond holds a str"):
        fd.sample(den, (2, 1, 8, 8), cond={"prompt": "a cat"}, steps=3)
    with pytest.raises(TypeError, match=r"pass fd\.cfg"):
        fd.sample(den, (2, 1, 8, 8), guidance=2.0, **args)
    with pytest.raises(ValueError, match="no weight"):
        fd.cfg(math.nan)


def test_modules_keep_their_own_mode(den):
    net = ForeignUNet().train()
    net.middle.eval()
    fd.sample(den.with_net(net), (1, 1, 8, 8), steps=2)
    assert net.training
    assert not net.middle.training


def test_where_a_plain_function_computes():
    den = fd.Denoiser(lambda x, t, c: x, fd.cosine(), "v", device="meta")
    assert den.device.type == "meta"
    seen = []

    def net(x, t, cond):
        seen.append((x.device.type, t.device.type))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fd.sample(fd.Denoiser(net, fd.cosine(), "v", device="meta"), (2, 1, 4, 4))
    assert seen == [("meta", "meta")]


def test_more_mistakes(den):
    with pytest.raises(ValueError, match="no image batch"):
        fd.sample(den, (0, 1, 8, 8))
    with pytest.raises(ValueError, match="no null condition"):
        fd.sample(fd.Denoiser(den.net, den.schedule), (2, 1, 8, 8), cond=[1, 2], guidance=fd.cfg(2.0))
    with pytest.raises(ValueError, match="predicts='epsilon' is unknown"):
        fd.Denoiser(den.net, den.schedule, "epsilon")
    with pytest.raises(ValueError, match="no interval"):
        fd.cfg(2.0, between=(3.0, 1.0))
    with pytest.raises(ValueError, match="the network returned"):
        fd.sample(fd.Denoiser(lambda x, t, c: x[:, :, :4], fd.cosine()), (2, 1, 8, 8))


def test_a_users_own_solver_schedule_and_network():
    """Nothing is registered: a solver that is a function, a schedule of two functions, a network that is a lambda."""

    def my_euler(levels):
        u, v = levels.u[:-1], levels.u[1:]
        coef = np.zeros((len(u), 7))
        coef[:, 0], coef[:, 1] = v / u, 1 - v / u
        return fd.Table(u, coef, np.zeros((len(u), 2)), np.ones(len(u)), 0.0, None, None)

    mine = fd.schedule(np.cos, np.sin, t_max=1.5, t_end=0.01)
    den = fd.Denoiser(lambda x, t, cond: 0.3 * x, mine, "v")
    times = np.linspace(1.5, 0.01, 12)
    a = fd.sample(den, (2, 1, 4, 4), my_euler, times=times)
    b = fd.sample(den, (2, 1, 4, 4), "euler", times=times)
    assert (a - b).abs().max() <= 1e-6
