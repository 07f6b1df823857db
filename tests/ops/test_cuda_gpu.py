"""The CUDA kernels on a GPU against float64 and against themselves. `pytest -m gpu` on a machine that has one."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff.ops import cuda, group_norm_silu_cuda, inject_cuda, normal_cuda, philox, q_sample_cuda, step, step_cuda
from fastdiff.ops.group_norm_silu import group_norm_silu_ref, layout
from fastdiff.ops.inject import inject_ref
from fastdiff.ops.q_sample import q_sample_ref
from tests.ops import emulated
from tests.ops.cases import CASES as STEPS, copied, inputs, run
from tests.ops.test_cpp import MASKS, noising
from tests.ops.test_group_norm_cpp import CASES as NORMS, NAMES, Case, arguments, by_reference, cast, small_grads

# on the CPU where tests name an emulated library: the checks themselves are checked there
EMULATED = emulated.given()
DEVICE = "cpu" if EMULATED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(EMULATED is None and cuda.missing() is not None, reason=str(cuda.missing())),
]


@pytest.fixture(autouse=True)
def kernels():
    if EMULATED is None:
        yield
    else:
        with emulated.on_the_cpu(EMULATED):
            yield


def there(args):
    """Tensors moved to the GPU with their strides, and what lies fresh there full of NaN."""
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in args.items()}


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 33, 31), (4, 64, 64), (1,)])
def test_normal(shape):
    key, index = philox.seed_tensor(2**63 + 5), torch.arange(16) + 2**33
    z = normal_cuda.run(key.to(DEVICE), index.to(DEVICE), 7, philox.STEP, shape).cpu().double()
    wanted = philox.normal(key, index, 7, philox.STEP, shape, torch.float64)
    # the radius of a pair; fast functions are within 5e-6, where it is small within 5e-4
    radius = wanted.flatten(1)
    radius = torch.nn.functional.pad(radius, (0, radius.shape[1] % 2)).unflatten(1, (-1, 2)).norm(dim=2)
    far = radius.repeat_interleave(2, 1)[:, : math.prod(shape)].reshape(wanted.shape) >= 0.05
    assert (z - wanted)[far].abs().max() <= 5e-6
    assert (z - wanted).abs().max() <= 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (4, 3, 16, 16), (2, 1, 3, 5, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize("name", [None, *MASKS])
def test_q_sample(shape, dtype, name):
    if name == "every second" and len(shape) == 5:
        pytest.skip("the other shapes have it")
    x0, t, table, noise = noising(shape, dtype)
    given = {"noise": noise, "where": None if name is None else MASKS[name](*shape), "eps": True, "v": True}
    got = q_sample_cuda.run(*there({"a": x0, "b": t, "c": table}).values(), **there(given))
    for a, b in zip(got, q_sample_ref(x0, t, table, **given), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("name", STEPS)
def test_step(name):
    args = inputs(STEPS[name])
    wanted, got = run(step.step_reference_, copied(args)), run(step_cuda.run, there(copied(args)))
    for key in ("x", "x_in", "h"):
        assert torch.equal(got[key].isnan().cpu(), wanted[key].isnan())
        assert got[key].stride() == args[key].stride()
        difference = (got[key].cpu().double() - wanted[key].double()).nan_to_num()
        size = wanted[key].double().nan_to_num().abs().max() if difference.numel() else 0.0
        limit = 2 * torch.finfo(wanted[key].dtype).eps * size + 1e-5
        assert difference.numel() == 0 or difference.abs().max() <= limit
    assert torch.equal(got["bad"].cpu(), wanted["bad"])


def by_kernel(args, dy):
    args = there(args)
    first = [args[k] for k in ("x", "groups", "weight", "bias")]
    rest = {k: args[k] for k in ("x2", "add", "scale", "shift", "act")}
    y, stats = group_norm_silu_cuda.run(*first, **rest)
    dx, dx2, sums = group_norm_silu_cuda.run_backward(dy.to(DEVICE), first[0], stats, *first[1:], **rest)
    results = {"y": y, "stats": stats, "dx": dx, "dx2": dx2, "sums": sums} | small_grads(sums, args)
    return {k: v.cpu() for k, v in results.items()}


def compare(got, own, exact, name):
    if exact.numel() == 0 or exact.isnan().all():
        assert not got.any()
        return
    ours, theirs = (float((v.double() - exact).abs().max()) for v in (got, own))
    factor, slack = (2, 2e-7) if name == "y" else (3, 1e-6)
    assert ours <= factor * theirs + slack * exact.abs().max(), f"{name}: error {ours:.1e}, PyTorch's {theirs:.1e}"


# beside the small ones: tiles of a block, of clusters of 2 to 8, and two passes
LARGE = {
    f"{shape} {dtype} {last}": Case(shape, 32, given=NAMES, dtype=dtype, last=last)
    for shape in ((64, 128, 32, 32), (32, 256, 32, 32), (2, 320, 64, 64), (20, 192, 64, 64), (2, 64, 256, 256))
    for dtype in (torch.float32, torch.bfloat16)
    for last in (False, True)
}


@pytest.mark.parametrize("name", [*NORMS, *([] if EMULATED else LARGE)])
def test_norm(name):
    case = (NORMS | LARGE)[name]
    args = arguments(case)
    dy = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    got = by_kernel(args, dy)
    exact = by_reference(cast(args, torch.float64), dy.double(), group_norm_silu_ref)
    own = by_reference(args, dy, group_norm_silu_ref)
    for key, wanted in exact.items():
        compare(got[key], own[key], wanted, key)
    assert got["y"].is_contiguous(memory_format=layout(args["x"]))


@pytest.mark.parametrize("own", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_residual(last, dtype, own):
    args = arguments(Case((3, 24, 9, 16), 1, 0, NAMES[2:], True, last, dtype=dtype))
    args = {k: args[k] for k in ("x", "add", "scale", "shift", "act")}
    args["residual"] = torch.randn_like(args["x"], dtype=own or dtype)
    y = inject_cuda.run(**there(args)).cpu()
    compare(y, inject_ref(**args), inject_ref(**cast(args, torch.float64)), "y")


@pytest.mark.parametrize("last", [False, True])
def test_inject(last):
    args = arguments(Case((3, 24, 9, 16), 1, 0, NAMES[2:], True, last))
    args = {k: args[k] for k in ("x", "add", "scale", "shift", "act")}
    dy = torch.randn(3, 24, 9, 16, generator=torch.Generator().manual_seed(1))
    exact, own = by_reference(cast(args, torch.float64), dy.double(), inject_ref), by_reference(args, dy, inject_ref)
    x, *rest = there(args).values()
    options = dict(zip(("add", "scale", "shift", "act"), rest, strict=True))
    y, (dx, sums) = inject_cuda.run(x, **options), inject_cuda.run_backward(dy.to(DEVICE), x, **options)
    sums = sums.cpu()
    factor = 1 + args["scale"]
    got = {"y": y.cpu(), "dx": dx.cpu(), "dadd": factor * sums[..., 0], "dscale": sums[..., 1], "dshift": sums[..., 0]}
    for key, wanted in exact.items():
        compare(got[key], own[key], wanted, key)


@pytest.mark.parametrize("name", ["threads", "threads NCHW", "straddling last", "bf16 last"])
def test_repeats_are_equal(name):
    """A race between threads would show here."""
    case = NORMS[name]
    args, dy = arguments(case), torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    first = by_kernel(args, dy)
    for _ in range(2 if EMULATED else 250):
        assert all(torch.equal(v, first[k]) for k, v in by_kernel(args, dy).items())


@pytest.mark.skipif(EMULATED is not None, reason="takes a GPU's memory")
def test_more_than_2_to_the_31_elements():
    """The last image of a tensor of 2^31 + 2^20 numbers, against the same image alone."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    images = 2049
    x = torch.empty(images, 16, 256, 256, dtype=torch.bfloat16, device="cuda").normal_()
    y, _ = group_norm_silu_cuda.run(x, 4, None, None)
    alone = group_norm_silu_ref(x[-1:], 4, None, None)
    assert (y[-1:].float() - alone.float()).abs().max() <= 0.05
    del y
    t, table = torch.zeros(images, dtype=torch.int64, device="cuda"), torch.tensor([[0.6, 0.8]], device="cuda")
    at = {"seed": torch.tensor([3], device="cuda"), "index": torch.arange(images, device="cuda")}
    many = q_sample_cuda.run(x, t, table, **at)[0]
    one = q_sample_cuda.run(x[-1:], t[-1:], table, seed=at["seed"], index=at["index"][-1:])[0]
    assert torch.equal(many[-1:], one)
