"""The same numbers on a GPU as on the CPU: noise, loops, training. `pytest -m gpu` on a machine that has one."""

import pytest
import torch

import fastdiff as fd
from fastdiff.ops import philox
from tests.ops.cases import CASES, copied, inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none here"),
]


def on_gpu(args):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in copied(args).items()}


def test_uniforms_are_bit_equal_and_normals_agree():
    index = torch.arange(16) + 2**33
    key = philox.seed_tensor(2**63 + 5)
    args = (7, philox.STEP, (3, 33, 31))
    assert torch.equal(philox.uniform(key.cuda(), index.cuda(), *args).cpu(), philox.uniform(key, index, *args))
    z = philox.normal(key, index, *args, torch.float64)
    assert (philox.normal(key.cuda(), index.cuda(), *args).cpu() - z).abs().max() <= 1e-6


@pytest.mark.parametrize("name", CASES)
def test_step(name):
    args = inputs(CASES[name])
    with fd.backend("reference"):
        wanted, got = run(fd.ops.step_, copied(args)), run(fd.ops.step_, on_gpu(args))
    for key in ("x", "x_in", "h"):
        difference = (got[key].cpu().double() - wanted[key].double()).nan_to_num()
        size = wanted[key].double().nan_to_num().abs().max() if difference.numel() else 0.0
        limit = 2 * torch.finfo(wanted[key].dtype).eps * size + 2e-6
        assert difference.numel() == 0 or difference.abs().max() <= limit
        assert torch.equal(got[key].isnan().cpu(), wanted[key].isnan())
    assert torch.equal(got["bad"].cpu(), wanted["bad"])


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_the_shipped_model_draws_the_same_images(solver):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = fd.load("digits"), fd.load("digits")
    there.net.cuda()
    args = {"steps": 20, "seed": 4, "cond": range(10), "guidance": fd.cfg(2.0)}
    a, b = (fd.sample(den, (10, 1, 8, 8), solver, **args) for den in (here, there))
    assert b.device.type == "cuda"
    # a single pixel near a decision may go the other way: images, not bits, are the same
    assert (a - b.cpu()).abs().mean() <= 1e-3


def test_training_starts_with_the_same_losses():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = fd.UNet(in_channels=1, channels=16, mults=(1, 2), blocks=1, classes=10).to(device)
        den = fd.Denoiser(net, fd.cosine(), "v")
        steps = fd.fit(den, fd.load_data("digits"), batch=32, steps=3)
        losses.append([float(step.loss) for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
