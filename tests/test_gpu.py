"""The same numbers on a GPU as on the CPU: noise, loops, training. `pytest -m gpu` on a machine that has one."""

import pytest
import torch

import fastdiff as fd
from fastdiff.ops import dispatch, group_norm_silu, normal, philox, q_sample
from tests.ops import describe, pairwise, sweep
from tests.ops.cases import CASES, copied, inputs, run
from tests.ops.describe_all import DESCRIPTIONS, cells_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none here"),
]


KERNELS = ("triton", "cuda")


def skip_without(backend, op):
    if backend not in dispatch._table[op] or (why := dispatch.reason(op, backend)) is not None:
        pytest.skip(f"{op} on {backend}: {why if backend in dispatch._table[op] else 'no kernel'}")


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


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_3m_sde"])
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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_parity(name, backend):
    """The covering array, and 300 cells of the full product: 2,700 over all ops."""
    what = DESCRIPTIONS[name]
    skip_without(backend, what.op)
    for cell in (*cells_of(name), *pairwise.sampled(what.factors, seed=100 + what.seed, count=300)):
        assert not sweep.complaints(what, cell, backend), describe.named(cell)


@pytest.mark.parametrize("backend", KERNELS)
def test_normals_of_the_kernels(backend):
    """5e-6 from the accurate ones, 5e-4 where r < 0.05 (DESIGN, section 4)."""
    skip_without(backend, "normal")
    key, index, shape = philox.seed_tensor(2**63 + 5), torch.arange(64) + 2**33, (3, 64, 64)
    exact = philox.normal(key, index, 7, 3, shape, torch.float64).flatten().reshape(-1, 2)
    with fd.backend(backend):
        got = normal(key.cuda(), index.cuda(), 7, 3, shape).cpu().flatten().reshape(-1, 2)
    near = exact.square().sum(1).sqrt() < 0.05
    error = (got - exact).abs().amax(1)
    assert error[~near].max() <= 5e-6
    assert near.any()
    assert error[near].max() <= 5e-4


def need(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_2_to_the_31_elements(backend):
    """The last image of a large batch is what it is alone."""
    need(24)
    skip_without(backend, "q_sample")
    skip_without(backend, "group_norm_silu")
    x = torch.randn(2, 32, 2**13, 2**12 + 8, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    table = torch.tensor([[0.9, 0.3], [0.4, 0.8]], device="cuda")
    t, key, index = (torch.tensor(v, device="cuda") for v in ([1, 0], [5], [3, 4]))
    with fd.backend(backend):
        x_t = q_sample(x, t, table, seed=key, index=index)
        assert torch.equal(x_t[1:], q_sample(x[1:], t[1:], table, seed=key, index=index[1:]))
        del x_t
        y = group_norm_silu(x, 8, None, None)
        assert torch.equal(y[1:], group_norm_silu(x[1:], 8, None, None))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_compiled_network(backend):
    """One graph, forward and backward, with the eager step's gradients."""
    for op in ("group_norm_silu", "time_embed"):
        skip_without(backend, op)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net = fd.UNet(in_channels=2, channels=16, mults=(1, 2), blocks=1, groups=4, scale_shift=True).cuda()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, device="cuda"))
    x, t = torch.randn(2, 2, 8, 8, device="cuda"), torch.tensor([3.0, 400.0], device="cuda")
    found = []
    with fd.backend(backend):
        for f in (net, torch.compile(net, fullgraph=True)):
            loss = (f(x, t) - x).square().mean()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    assert (found[1] - found[0]).norm() <= 1e-4 * found[0].norm()
