"""Guidance by energies: the tilted Gaussian in closed form, classifiers, intervals, every run."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff as fd
from fastdiff import row
from tests.sampling.foreign import ForeignUNet
from tests.sampling.recorder import FakeRecorder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]

SHAPE = (3, 1, 8, 8)
PREDICTS = ["eps", "x0", "v", "score"]


def gaussian(schedule, predicts, mean, variance=0.3):
    """The exact network of data N(mean, variance): E[x0 | x_t], in any of its forms, in float64 inside."""

    def net(x, t, cond):
        # t in 0..1, one number a batch
        alpha, sigma = (float(f(float(t[0]))) for f in (schedule.alpha, schedule.sigma))
        x = x.double()
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        F = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[predicts]
        return F

    return fd.Denoiser(net, schedule, predicts)


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("w", [None, 1.7])
def test_a_linear_energy_of_x_t_moves_the_gaussian_as_it_must(predicts, w):
    """E = <b, x_t> tilts N(m, s^2) into N(m - weight s^2 b, s^2): x0' = x0 - weight sigma^2/alpha b, on every row."""
    schedule, mean, b, weight = fd.vp(), 0.4, torch.randn(SHAPE[1:], dtype=torch.float64), 0.8
    den = gaussian(schedule, predicts, mean)
    given = {"solver": "ddim", "times": [0.9, 0.6], "x": torch.randn(SHAPE), "clip": float("inf")}
    if w is not None:  # both halves get the same push, whatever the weight between them
        given |= {"cond": torch.zeros(3), "seed": 1}
    free = [] if w is None else [fd.cfg(w, null=torch.zeros(3))]
    pull = fd.energy(lambda x, t, cond: (x * b).sum((1, 2, 3)), weight, of="x_t")
    fast = fd.Sampler(den, SHAPE, dtype=torch.float64)
    plain, tilted = fast(guidance=free, **given), fast(guidance=[*free, pull], **given)
    r = fd.plan(schedule, predicts, fd.ddim, times=[0.9, 0.6], w=1.0 if w is None else w)[0]
    shift = -weight * r[row.SIGMA] ** 2 / r[row.ALPHA] * b
    # what the row makes of a change of x0 (BF is zero here)
    assert float((tilted - plain - r[row.B0] * shift).abs().max()) <= 1e-12


def test_an_energy_of_x0_goes_through_the_network():
    """E = |x0 - y|^2 / 2, x0 linear in x with slope c: the push on x0 is -weight sigma^2/alpha c (x0 - y)."""
    schedule, y, weight = fd.vp(), torch.randn(SHAPE, dtype=torch.float64), 0.5
    den = gaussian(schedule, "eps", 0.4)
    pull = fd.energy(lambda x0, t, y: (x0 - y).square().sum((1, 2, 3)) / 2, weight, told=y)
    x = torch.randn(SHAPE, dtype=torch.float64)
    given = {"solver": "ddim", "times": [0.75, 0.25], "x": x, "clip": float("inf")}
    fast = fd.Sampler(den, SHAPE, dtype=torch.float64)
    plain, tilted = fast(**given), fast(guidance=pull, **given)
    r = fd.plan(schedule, "eps", fd.ddim, times=[0.75, 0.25])[0]
    alpha, sigma = r[row.ALPHA], r[row.SIGMA]
    slope = alpha * 0.3 / (alpha**2 * 0.3 + sigma**2)
    x0 = 0.4 + slope * (x - alpha * 0.4)
    shift = -weight * sigma**2 / alpha * slope * (x0 - y)
    assert float((tilted - plain - r[row.B0] * shift).abs().max()) <= 1e-12


@pytest.fixture
def den():
    torch.manual_seed(0)
    return fd.Denoiser(ForeignUNet().eval(), fd.vp(), "eps", null=lambda c: torch.full_like(c, 10))


@pytest.fixture
def judge():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.SiLU(), torch.nn.Linear(16, 5))
    return lambda x, t: net(x) * (1 + t[:, None])


def test_classifier_guidance_is_the_papers(den, judge):
    """eps' = eps - w sigma grad log p(label | x_t), Dhariwal & Nichol 2021, algorithm 2."""
    labels, w = torch.tensor([4, 0, 2]), 3.0

    def net(x, t, cond):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            chosen = judge(z, t).log_softmax(1).gather(1, labels[:, None]).sum()
            (grad,) = torch.autograd.grad(chosen, z)
        sigma = torch.as_tensor(den.schedule.sigma(t.double().numpy())).reshape(-1, 1, 1, 1)
        return den.net(x, t, cond) - w * sigma.float() * grad

    given = {"solver": "ddpm", "steps": 4, "seed": 3, "clip": 1.0}
    wanted = fd.sample(den.with_net(net), SHAPE, **given)
    got = fd.sample(den, SHAPE, guidance=fd.classifier(judge, w, labels=labels), **given)
    assert (got - wanted).abs().max() <= 1e-5
    assert (got - fd.sample(den, SHAPE, **given)).abs().max() > 1e-2

    # labels are cond where none are given
    def blind(x, t, cond):
        return den.net(x, t, None)

    same = fd.sample(den.with_net(blind), SHAPE, guidance=fd.classifier(judge, w), cond=labels, **given)
    assert torch.equal(same, got)


def test_an_interval_and_a_weight_of_zero_cost_no_gradient(den):
    calls = []

    def f(x, t, cond):
        calls.append(float(t[0]))
        return x.square().sum((1, 2, 3))

    given = {"steps": 8, "seed": 1}
    plain = fd.sample(den, SHAPE, **given)
    assert torch.equal(fd.sample(den, SHAPE, guidance=fd.energy(f, 0.0), **given), plain)
    assert calls == []
    fd.sample(den, SHAPE, guidance=fd.energy(f, 0.1, between=(0.5, 2.0)), **given)
    rows = fd.plan(den.schedule, "eps", fd.ddim, steps=8)[:-1]
    u = rows[:, row.SIGMA] / rows[:, row.ALPHA]
    assert calls == pytest.approx(list(rows[(u >= 0.5) & (u <= 2.0), row.T]))


def test_gradients_are_captured_and_compiled_with_the_step(den, judge):
    """Forward and backward in one graph; weight, labels and condition are copied into it."""
    FakeRecorder.forget()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    runs = [fd.eager, fd.graph(recorder=FakeRecorder), fd.compiled(backend=counter)]
    slow, graph, compiled = (fd.Sampler(den, SHAPE, run) for run in runs)
    target = torch.randn(SHAPE)

    def far(x0, t, y):
        return (x0 - y).square().mean((1, 2, 3))

    for w, label, cond in ((2.0, [1, 2, 3], [0, 1, 2]), (0.5, [0, 0, 4], [3, 3, 3])):
        guidance = [
            fd.cfg(1.5),
            fd.classifier(judge, w, labels=torch.tensor(label)),
            fd.energy(far, 1.0, told=target * w),
        ]
        given = {"steps": 6, "guidance": guidance, "cond": torch.tensor(cond), "eta": 1.0, "seed": 4}
        wanted = slow("ddim", **given)
        assert (wanted - slow("ddim", **given | {"guidance": fd.cfg(1.5)})).abs().max() > 1e-3
        assert torch.equal(graph("ddim", **given), wanted)
        assert (compiled("ddim", **given) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert [[r.replays for r in recorder.recordings] for recorder in FakeRecorder.all] == [[10]]
    assert counter.frame_count == 1


def test_a_learned_variance_keeps_its_half():
    net = fd.UNet(in_channels=1, channels=8, mults=(1,), blocks=1, attention=(), learned_variance=True).eval()
    torch.nn.init.normal_(net.out.weight, std=0.1)
    den = fd.Denoiser(net, fd.linear(), "eps+range")
    given = {"solver": "ddpm", "variance": "learned_range", "steps": 5, "seed": 2}
    nothing = fd.energy(lambda x, t, c: 0 * x.sum((1, 2, 3)))
    plain = fd.sample(den, SHAPE, **given)
    assert (fd.sample(den, SHAPE, guidance=nothing, **given) - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_an_energy_of_x_t_keeps_nothing_of_the_network(den, judge):
    """Nor does the reuse of its deep part grow into a graph of all rows."""
    net = fd.UNet(in_channels=1, channels=8, mults=(1, 2), blocks=1, attention=()).eval()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fast = fd.Sampler(fd.Denoiser(net, fd.vp(), "eps"), SHAPE, fd.eager)
        pull = fd.classifier(judge, 1.0, labels=torch.tensor([1, 2, 3]))
        fast(steps=6, guidance=pull, reuse=fd.deep_cache(2))
    (held,) = fast._held.values()
    assert not held.state.deep.requires_grad
    assert sum(kept) <= 6 * 3 * 500


def test_mistakes(den):
    def f(x, t, cond):
        return x.sum()

    with pytest.raises(ValueError, match=r"returned \(\) for 3 images"):
        fd.sample(den, SHAPE, steps=2, guidance=fd.energy(f))
    flow = fd.Denoiser(lambda x, t, c: x, fd.flow(), "flow")
    with pytest.raises(ValueError, match="alpha = 0"):
        fd.sample(flow, SHAPE, steps=2, guidance=fd.energy(f))
    with pytest.raises(TypeError, match="is no function"):
        fd.energy(3)
    with pytest.raises(ValueError, match="of='x'"):
        fd.energy(f, of="x")
    with pytest.raises(ValueError, match="weight=inf"):
        fd.energy(f, float("inf"))
    with pytest.raises(ValueError, match="between"):
        fd.energy(f, between=(2, 1))
    with pytest.raises(ValueError, match=r"two fd\.cfg"):
        fd.sample(den, SHAPE, steps=2, guidance=[fd.cfg(2.0), fd.cfg(3.0)])
    with pytest.raises(TypeError, match=r"pass fd.cfg\(w\)"):
        fd.sample(den, SHAPE, steps=2, guidance=[2.0])
    with pytest.raises(ValueError, match="cond holds 2 images"):
        fd.sample(den, SHAPE, steps=2, guidance=fd.energy(f, told=torch.zeros(2)))
