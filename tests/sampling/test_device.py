"""What sampling asks of a device: never a number back while it runs, and no float64, which some devices lack.

The meta device stands for any other than the CPU: a tensor there has no numbers, so that reading one raises.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.sampling import sampler
from tests.sampling.recorder import FakeRecorder

SHAPE = (2, 1, 8, 8)


class Doubles(TorchDispatchMode):
    """The ops whose results are float64 on the device, and how many ran there."""

    def __init__(self):
        super().__init__()
        self.found, self.ops = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, tuple | list) else [out]:
            if isinstance(v, torch.Tensor) and v.device.type == "meta":
                self.ops += 1
                if v.dtype == torch.float64:
                    self.found.add(str(func))
        return out


@pytest.fixture(autouse=True)
def no_verdict(monkeypatch):
    """The one read after the loop."""
    monkeypatch.setattr(sampler.Sampler, "_verdict", lambda self, s, call: None)


def denoiser(schedule, predicts="eps", wrap=lambda net: net):
    net = fd.UNet(in_channels=1, channels=8, mults=(1, 2), blocks=1, classes=4, learned_variance="+" in predicts)
    den = fd.Denoiser(net.eval().to("meta"), schedule, predicts)
    return fd.Denoiser(wrap(net), schedule, predicts, null=net.null, device="meta") if wrap(net) is not net else den


CALLS = [
    (fd.linear(), "eps", {"solver": "ddim", "eta": 1.0, "guidance": fd.cfg(2.0)}),
    (fd.linear(), "eps+range", {"solver": "ddpm", "variance": "learned_range", "steps": 5}),
    (fd.cosine(), "v", {"solver": "heun", "churn": 2.0, "guidance": fd.cfg(2.0, between=(0.1, 2.0))}),
    (fd.edm(), "edm", {"solver": "dpmpp_3m_sde", "each": lambda i, x, x0: x + x0}),
    (fd.ve(), "score", {"solver": "euler", "seed": 2**63, "index": [2**40, 3]}),
    (fd.flow(), "flow", {"solver": "dpmpp_2m", "x": torch.zeros(SHAPE)}),
]


@pytest.mark.parametrize("run", [fd.eager, fd.graph(recorder=FakeRecorder)], ids=["eager", "graph"])
@pytest.mark.parametrize(("schedule", "predicts", "call"), CALLS, ids=[c[2]["solver"] for c in CALLS])
def test_sampling_reads_nothing_back_and_has_no_float64_on_the_device(schedule, predicts, call, run):
    den = denoiser(schedule, predicts)
    with Doubles() as mode:
        x = fd.sample(den, SHAPE, **{"steps": 6, "cond": torch.tensor([1, 3]), "run": run, **call})
    assert x.device.type == "meta"
    assert x.dtype == torch.float32
    assert mode.ops > 200
    assert mode.found == set()


def test_a_read_and_a_float64_would_be_seen():
    with Doubles() as mode:
        fd.sample(denoiser(fd.vp(), wrap=lambda net: lambda x, t, c: net(x.double().float(), t, c)), SHAPE, steps=2)
    assert mode.found == {"aten._to_copy.default"}
    asks = denoiser(fd.vp(), wrap=lambda net: lambda x, t, c: net(x, t, c) if bool(x.sum() > 0) else x)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        fd.sample(asks, SHAPE, steps=2)
