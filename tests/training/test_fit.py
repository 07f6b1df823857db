"""Losses against the formulas, and a fit that learns."""

import itertools
import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.files.data import Data
from fastdiff.ops import philox
from fastdiff.training.fit import batches, order
from fastdiff.training.losses import draw_times

pytestmark = pytest.mark.usefixtures("one_thread")


class Constant(torch.nn.Module):
    """F = weight * x, so that losses have closed forms."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.seen = []

    def forward(self, x, t, cond=None):
        self.seen.append((x.detach().clone(), t, cond))
        return self.weight * x

    def null(self, cond):
        return torch.full_like(cond, -1)


SCHEDULES = [fd.linear(), fd.cosine(T=40), fd.vp(), fd.sub_vp(), fd.ve(), fd.edm(), fd.flow()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow", "score", "edm"])
def test_loss_against_the_formula(schedule, predicts):
    """Image by image in float64: x_t, what the network should have said, the squared distance."""
    net = Constant()
    den = fd.Denoiser(net, schedule, predicts, sigma_data=0.6)
    x0 = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.arange(5) + 2**33
    got = fd.loss(den, x0, seed=7, index=index)
    key = philox.seed_tensor(7)
    t = draw_times(schedule, key, index)
    eps = philox.normal(key, index, 0, philox.Q_SAMPLE, (1, 4, 4), torch.float64)
    total = 0.0
    for n in range(5):
        a, s = float(schedule.alpha(t[n : n + 1])[0]), float(schedule.sigma(t[n : n + 1])[0])
        x, e = x0[n].double(), eps[n]
        x_t = a * x + s * e
        d = 0.6
        c_in = 1 / math.sqrt(s * s + a * a * d * d) if predicts == "edm" else 1.0
        F = 0.3 * c_in * x_t
        wanted = {
            "eps": e,
            "x0": x,
            "v": a * e - s * x,
            "flow": e - x,
            "score": -e / s if s else e,
            "edm": (x - d * d * a / (s * s + a * a * d * d) * x_t) * math.sqrt(s * s + a * a * d * d) / (d * s),
        }[predicts]
        weight = s if predicts == "score" else 1.0
        total += float((weight**2 * (F - wanted) ** 2).mean()) / 5
    assert math.isclose(float(got.detach()), total, rel_tol=2e-3 if predicts == "edm" else 2e-5)


def test_uint8_pixels_give_the_loss_of_their_floats():
    net = Constant()
    den = fd.Denoiser(net, fd.cosine(), "x0")
    pixels = torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8)
    a, b = fd.loss(den, pixels, seed=1), fd.loss(den, pixels.float() / 127.5 - 1, seed=1)
    assert math.isclose(float(a.detach()), float(b.detach()), rel_tol=1e-6)


def test_times_cover_the_schedule():
    key, index = philox.seed_tensor(0), torch.arange(1 << 15)
    t = draw_times(fd.linear(T=10), key, index)
    counts = np.bincount(t.astype(int), minlength=10)
    assert len(counts) == 10
    assert abs(counts - len(index) / 10).max() < 5 * math.sqrt(len(index) * 0.09)
    t = draw_times(fd.vp(), key, index)
    assert t.min() >= 1e-3
    assert t.max() <= 1
    assert abs(t.mean() - 0.5005) < 0.01
    log = np.log(draw_times(fd.edm(), key, index))
    assert abs(log.mean() + 1.2) < 0.03
    assert abs(log.std() - 1.2) < 0.03
    log = np.log(draw_times(fd.ve(), key, index))
    assert abs(log.mean() - (math.log(0.01) + math.log(50)) / 2) < 0.05


def test_every_epoch_shows_every_image_once():
    data = Data(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), np.arange(50), tuple("ab"))
    seen = [int(v) for images, _ in itertools.islice(batches(data, 10, seed=3), 10) for v in images.flatten()]
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:]
    assert seen[:50] == order(50, 3, 0).tolist()
    images, labels = next(batches(data, 64))
    assert torch.equal(images.flatten().long(), labels)
    assert images.dtype == torch.uint8


def test_dropped_conditions():
    net = Constant()
    den = fd.Denoiser(net, fd.cosine(), "x0")
    x = torch.zeros(4000, 1, 1, 1)
    cond = torch.arange(4000)
    for _ in fd.fit(den, [(x, cond)], steps=1, drop=0.25):
        pass
    seen = net.seen[0][2]
    share = float((seen == -1).float().mean())
    assert abs(share - 0.25) < 0.04
    assert torch.equal(seen[seen >= 0], cond[seen >= 0])


def test_ema_is_the_running_average():
    torch.manual_seed(0)
    net = Constant()
    den = fd.Denoiser(net, fd.cosine(), "x0")
    x = torch.randn(8, 1, 2, 2)
    average = 0.3
    for step in fd.fit(den, [x], steps=30, lr=0.05, ema=0.8, warmup=0):
        decay = min(0.8, (1 + step.i) / (10 + step.i))
        average = decay * average + (1 - decay) * float(net.weight.detach())
        assert math.isclose(float(step.ema.net.weight), average, rel_tol=1e-5)
    assert abs(float(net.weight.detach()) - 0.3) > 0.05
    assert step.ema.net is not net


def test_the_same_seed_is_the_same_run():
    def run(seed):
        torch.manual_seed(1)
        den = fd.Denoiser(fd.UNet(in_channels=1, channels=8, mults=(1, 2), blocks=1, classes=3), fd.cosine(), "v")
        data = Data(
            np.random.default_rng(0).integers(0, 256, (32, 1, 4, 4), dtype=np.uint8), np.arange(32) % 3, tuple("abc")
        )
        return [float(step.loss) for step in fd.fit(den, data, steps=5, batch=16, seed=seed)]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_fit_learns_what_the_data_says():
    """All images are one constant: the loss of predicting x0 falls to nearly nothing, and sampling returns it."""
    torch.manual_seed(0)
    net = fd.UNet(in_channels=1, channels=16, mults=(1,), blocks=1, attention=())
    den = fd.Denoiser(net, fd.cosine(T=100), "x0")
    x = torch.full((16, 1, 4, 4), 0.5)
    losses = [(float(step.loss), step.ema) for step in fd.fit(den, [x], steps=150, lr=3e-3, ema=0.9, warmup=10)]
    assert losses[-1][0] < 0.02 * losses[0][0]
    got = fd.sample(losses[-1][1], (4, 1, 4, 4), steps=20)
    assert (got - 0.5).abs().max() < 0.1


def test_a_loss_without_a_seed_differs_from_call_to_call():
    den = fd.Denoiser(Constant(), fd.cosine(), "eps")
    x = torch.zeros(4, 1, 2, 2)
    torch.manual_seed(5)
    a, b = fd.loss(den, x).detach(), fd.loss(den, x).detach()
    assert a != b
    torch.manual_seed(5)
    assert fd.loss(den, x).detach() == a


def test_loaders_of_every_form():
    x, y = torch.zeros(6, 1, 2, 2), torch.arange(6)
    for data in ((x,), (x, y)):
        net = Constant()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=3)
        steps = list(fd.fit(fd.Denoiser(net, fd.cosine(), "x0"), loader, steps=3, drop=0))
        assert [s.i for s in steps] == [0, 1, 2]
        assert [None if c is None else c.tolist() for _, _, c in net.seen] == (
            [None] * 3 if len(data) == 1 else [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
        )


def test_the_average_of_half_precision_weights_still_moves():
    net = Constant().bfloat16()
    x = torch.randn(8, 1, 2, 2)
    *_, last = fd.fit(fd.Denoiser(net, fd.cosine(), "x0"), [x], steps=40, lr=0.05, ema=0.999, warmup=0)
    assert last.ema.net.weight.dtype == torch.float32
    assert abs(float(last.ema.net.weight) - 0.3) > 1e-3


def test_mistakes():
    den = fd.Denoiser(Constant(), fd.cosine(), "x0")
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        next(fd.fit(fd.Denoiser(lambda x, t, c: x, fd.cosine()), [x]))
    with pytest.raises(ValueError, match="lr=-1"):
        next(fd.fit(den, [x], lr=-1))
    with pytest.raises(ValueError, match="gave no batch"):
        next(fd.fit(den, []))
    with pytest.raises(ValueError, match="gave 3 parts"):
        next(fd.fit(den, [(x, x, x)]))
    with pytest.raises(ValueError, match="batch=0"):
        next(fd.fit(den, [x], batch=0))
    with pytest.raises(ValueError, match="hold no image"):
        next(fd.fit(den, Data(np.zeros((0, 1, 2, 2), np.uint8), None, ())))
    plain = fd.UNet(in_channels=1, channels=8, mults=(1,), blocks=1, classes=3, null_class=False, attention=())
    with pytest.raises(ValueError, match="pass drop=0"):
        next(fd.fit(fd.Denoiser(plain, fd.cosine(), "v"), [(x, torch.tensor([0, 1]))]))
    with pytest.raises(ValueError, match="check its output channels"):
        fd.loss(fd.Denoiser(lambda x, t, c: torch.cat([x, x], 1), fd.cosine(), "eps"), x)
    with pytest.raises(ValueError, match="kind='fast'"):
        fd.loss(den, x, kind="fast")
    with pytest.raises(ValueError, match="no simple loss"):
        fd.loss(fd.Denoiser(Constant(), fd.cosine(), "mean"), x)
