"""`Denoiser.prepare`: the same samples from the packed network."""

import pytest
import torch

import fastdiff as fd
from fastdiff.nn.prepare import PreparedUNet, Tactics
from tests.nn.test_unet import far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")


def denoiser() -> fd.Denoiser:
    net = randomise(fd.UNet(channels=8, mults=(1, 2), blocks=1, groups=4, attention=(2,), classes=3))
    return fd.Denoiser(net, fd.cosine(), "v", defaults={"steps": 4}, meta={"shape": [3, 4, 4]})


def test_samples_are_the_networks() -> None:
    den = denoiser()
    den.net.double()
    fast, shape = den.prepare(), (2, 3, 4, 6)
    given = {"seed": 3, "cond": [0, 2], "guidance": fd.cfg(2.0)}
    want = fd.Sampler(den, shape, dtype=torch.float64)(**given)
    assert far(fd.Sampler(fast, shape, dtype=torch.float64)(**given), want) <= 1e-10


def test_what_it_keeps_and_what_it_says() -> None:
    den = denoiser()
    fast = den.prepare(dtype=torch.bfloat16, tactics=Tactics(channels_last=False))
    assert isinstance(fast.net, PreparedUNet)
    assert fast.net.tactics == Tactics(channels_last=False)
    assert (fast.dtype, fast.device) == (torch.bfloat16, torch.device("cpu"))
    assert (den.dtype, fast.predicts, fast.defaults, fast.meta) == (torch.float32, "v", den.defaults, den.meta)
    assert fast.null(torch.tensor([0, 1])).tolist() == [3, 3]
    with pytest.raises(ValueError, match="the network is a PreparedUNet"):
        fd.save(fast, "nowhere")


def test_gradients_of_x0() -> None:
    den = denoiser()
    den.net.double()
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    want, got = (
        torch.autograd.grad(d.x0(x, 300, torch.tensor([0, 1])).square().sum(), x)[0] for d in (den, den.prepare())
    )
    assert far(got, want) <= 1e-12


def test_other_networks_are_named() -> None:
    for net in (torch.nn.Identity(), lambda x, t, cond: x):
        with pytest.raises(TypeError, match=r"fastdiff\.UNet.*fd\.patch"):
            fd.Denoiser(net, fd.cosine()).prepare()
