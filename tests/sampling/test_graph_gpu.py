"""CUDA graphs on a GPU: bit for bit the eager loop, the memory of one step, everything freed at the end."""

import gc

import pytest
import torch

import fastdiff as fd
from fastdiff.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none here"),
]

SHAPE = (4, 3, 32, 32)
BACKENDS = ("reference", "triton", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request):
    for op in ("step_", "group_norm_silu", "time_embed", "normal"):
        if (why := dispatch.reason(op, request.param)) is not None:
            pytest.skip(f"{op} on {request.param}: {why}")
    with fd.backend(request.param):
        yield request.param


@pytest.fixture
def den():
    torch.manual_seed(0)
    net = fd.UNet(channels=32, mults=(1, 2, 2), blocks=1, classes=10).cuda().eval()
    torch.nn.init.normal_(net.out.weight, std=0.02)
    return fd.Denoiser(net, fd.linear(), "eps")


CALLS = [
    {"solver": "ddim", "steps": 7, "eta": 1.0, "seed": 4, "clip": 1.0},
    {"solver": "heun", "steps": 6, "churn": 3.0, "seed": 5},
    {"solver": "dpmpp_3m_sde", "steps": 11, "seed": 2**63, "index": [7, 0, 2**40, 3]},
    {"solver": "ddim", "steps": 9, "seed": 3, "guidance": fd.cfg(2.0)},
    {"solver": "dpmpp_2m", "steps": 9, "seed": 3, "guidance": fd.cfg(3.0, between=(0.5, 5.0))},
]
COND = torch.tensor([3, 1, 4, 1])


@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_eager_bit_for_bit(den, backend, unroll, dtype):
    den.net.to(dtype)
    fast = fd.Sampler(den, SHAPE, fd.graph(unroll=unroll, benchmark=False))
    slow = fd.Sampler(den, SHAPE, fd.eager)
    for _ in range(2):
        for call in CALLS:
            assert torch.equal(fast(cond=COND, **call), slow(cond=COND, **call)), call
    steps = [held.steps for held in fast._held.values()]
    assert sum(len(s.captured) for s in steps) <= 3 * (1 + (unroll > 1))


def test_gradients_are_captured(den, backend):
    target = torch.randn(SHAPE)
    pull = fd.energy(lambda x0, t, y: (x0 - y).square().mean((1, 2, 3)), 2.0, told=target)
    fast, slow = (fd.Sampler(den, SHAPE, run) for run in (fd.graph(benchmark=False), fd.eager))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for seed in (1, 2):
            given = {"steps": 5, "seed": seed, "cond": COND, "guidance": pull}
            a, b = fast("ddim", **given), slow("ddim", **given)
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_graph_over_a_compiled_network(den):
    compiled = den.with_net(torch.compile(den.net, mode="max-autotune-no-cudagraphs"))
    given = {"solver": "ddim", "steps": 5, "seed": 1, "cond": COND}
    fast = fd.Sampler(compiled, SHAPE, fd.graph)
    wanted = fd.sample(den, SHAPE, run=fd.eager, **given)
    for _ in range(2):
        assert (fast(**given) - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    inner = fd.Sampler(den, SHAPE, fd.graph(step=fd.compiled))
    for _ in range(2):
        assert (inner(**given) - wanted).abs().max() <= 2e-2 * wanted.abs().max()


def reserved():
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_a_graph_holds_one_steps_activations_and_close_gives_them_back(den):
    shape = (64, 3, 32, 32)
    cond = torch.arange(64) % 10
    slow = fd.Sampler(den, shape, fd.eager)
    slow("ddim", steps=2, cond=cond)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    slow("ddim", steps=2, cond=cond)
    activations = torch.cuda.max_memory_allocated() - before
    slow.close()
    # cuBLAS keeps a workspace for the side stream, once in a process
    fd.sample(den, shape, "ddim", steps=5, cond=cond, run=fd.graph(benchmark=False))
    start = reserved()
    with fd.Sampler(den, shape, fd.graph(benchmark=False)) as fast:
        fast("ddim", steps=5, cond=cond)
        one = fast.memory
        # the allocator hands out blocks of 2 and 20 MiB
        assert 0 < one <= 1.01 * activations + (40 << 20), (one, activations)
        fast("heun", steps=5, cond=cond)
        assert fast.memory == one
    assert reserved() <= start


def test_what_cannot_be_captured_is_named(den):
    def asks(x, t, cond):
        return den.net(x, t, cond) if bool(x.sum() < 1e9) else x

    other = fd.Denoiser(asks, fd.linear(), "eps", device="cuda")
    given = {"solver": "ddim", "steps": 5, "seed": 1, "cond": COND}
    with pytest.raises(fd.CaptureError, match="_local_scalar_dense"):
        fd.sample(other, SHAPE, run=fd.graph, **given)
    wanted = fd.sample(other, SHAPE, run=fd.eager, **given)
    with pytest.warns(UserWarning, match="_local_scalar_dense"):
        got = fd.sample(other, SHAPE, **given)
    assert torch.equal(got, wanted)
    # and the device is as it was: the next capture succeeds, torch's generators work
    assert torch.equal(fd.sample(den, SHAPE, run=fd.graph(benchmark=False), **given), wanted)
    assert torch.randn(3, device="cuda").isfinite().all()


def test_nothing_waits_for_the_device_inside_the_loop(den):
    fast = fd.Sampler(den, SHAPE)
    fast("ddim", steps=4, cond=COND)
    (held,) = fast._held.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind, rows in held.steps.graph.captured:
            held.steps.run(kind, 3 * rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padded_batches_draw_the_same_images(den):
    fast = fd.Sampler(den, (8, 3, 32, 32), fd.graph(benchmark=False))
    cond = torch.arange(8)
    whole = fast("ddim", steps=5, eta=1.0, seed=2, cond=cond)
    part = fast("ddim", steps=5, eta=1.0, seed=2, cond=cond[:5], shape=(5, 3, 32, 32))
    assert (part - whole[:5]).abs().max() <= 1e-2 * whole.abs().max()
