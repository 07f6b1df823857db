"""group_norm_silu in Triton's interpreter, against float64: TRITON_INTERPRET=1 python -m pytest <this file>."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import group_norm_tiles as tiles, jit
from fastdiff.ops.group_norm_call import Given
from fastdiff.ops.group_norm_silu import group_norm_silu_ref, layout
from tests.ops.describe import laid

if not jit.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastdiff.ops import group_norm_backward_triton, group_norm_silu_triton, inject_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WALKS = {"walk": (8, 32, 2), "short walk": (16, 16, 2), "one tile": (16, 64, 1)}


class Case(NamedTuple):
    shape: tuple[int, ...]  # of cat([x, x2], 1)
    groups: int
    second: int = 0  # channels of x2
    dtype: torch.dtype = FP32
    last: bool = False
    path: str = "one pass"
    injected: tuple[str, ...] = ("add", "scale", "shift")
    per_image: bool = True
    affine: bool = True
    act: bool = True
    mean: float = 1.0
    outlier: float = 0.0


CASES = [
    # group sizes 6, 10, 12, 20, 30, 40, and groups across the seam of x and x2
    Case((2, 24, 5, 7), 4),
    Case((2, 20, 5, 7), 2, second=5),
    Case((1, 24, 4, 4), 2, dtype=BF16),
    Case((1, 40, 8, 8), 2, second=16, dtype=FP16),
    Case((2, 60, 3, 5), 2, second=40),
    Case((1, 80, 4, 4), 2, dtype=BF16, act=False),
    Case((2, 24, 5, 7), 4, last=True),
    Case((2, 20, 5, 7), 2, last=True, second=5),
    Case((1, 24, 4, 4), 2, last=True, dtype=BF16),
    Case((1, 40, 8, 8), 4, last=True, second=16, dtype=FP16),
    Case((2, 60, 3, 5), 2, last=True, second=40),
    Case((1, 80, 4, 4), 2, last=True, dtype=BF16, act=False),
    Case((2, 32, 4, 8), 8, last=True, per_image=False),
    Case((1, 24, 5, 7), 4, path="walk"),
    Case((1, 20, 7, 7), 2, path="short walk", second=5),
    Case((1, 24, 8, 8), 2, path="walk", dtype=BF16),
    Case((1, 40, 8, 8), 2, path="one tile", second=16, dtype=FP16),
    Case((1, 60, 5, 5), 2, path="one tile", second=40),
    Case((1, 24, 5, 7), 4, path="walk", last=True),
    Case((1, 20, 7, 7), 2, path="short walk", last=True, second=5),
    Case((1, 24, 8, 8), 2, path="walk", last=True, dtype=BF16),
    Case((1, 40, 8, 8), 2, path="one tile", last=True, second=16, dtype=FP16),
    Case((1, 60, 5, 5), 2, path="one tile", last=True, second=40),
    # channels that are no multiple of a slab's
    Case((2, 40, 3, 5), 10, last=True, dtype=BF16),
    Case((2, 30, 3, 5), 5, last=True, second=10),
    # injections, one a time and none; numbers for all images and for each
    Case((2, 12, 3, 5), 3, injected=()),
    Case((2, 12, 3, 5), 3, injected=("add",), affine=False),
    Case((2, 12, 3, 5), 3, injected=("scale",), per_image=False, path="short walk"),
    Case((2, 12, 3, 5), 3, injected=("shift",), last=True, act=False),
    Case((2, 12, 3, 5), 3, injected=(), affine=False, act=False, path="short walk", last=True),
    # primes, one group, as many groups as channels, one pixel, one and three axes
    Case((3, 7, 11), 1),
    Case((3, 7, 11), 7),
    Case((2, 14, 13), 7, path="short walk"),
    Case((2, 8, 1, 1), 2),
    Case((2, 8, 1, 1), 2, path="short walk"),
    Case((2, 6, 3, 4, 2), 3),
    Case((2, 6, 3, 4, 2), 3, last=True),
    Case((1, 6, 3, 4, 5), 3, last=True, path="short walk", second=3),
    Case((1, 3, 7, 3), 3, last=True),
    # statistics of images whose mean is 1e4 times their deviation, and of ones with a first pixel far from the others
    *(
        Case((1, 12, 9, 11), 3, path=path, last=last, second=second, mean=1e4)
        for path in ("one pass", "walk")
        for last, second in ((False, 0), (True, 6))
    ),
    *(Case((1, 8, 16, 16), 2, path=path, injected=(), outlier=1e4) for path in ("one pass", "walk")),
    Case((1, 8, 16, 16), 2, mean=-1e4, path="walk", dtype=BF16),
]


def tensors(case, seed=0):
    """x, x2, weight, bias and the injected, and dy."""
    g = torch.Generator().manual_seed(seed)
    n, channels, *space = case.shape
    z = case.mean + torch.randn(case.shape, generator=g) * (1 + torch.rand(channels, *(1 for _ in space), generator=g))
    z.flatten(2)[:, :, 0] += case.outlier
    dy = torch.randn(case.shape, generator=g).to(case.dtype)
    weight, bias = torch.randn(2, channels, generator=g) if case.affine else (None, None)
    size = (n, channels) if case.per_image else (channels,)
    given = {name: torch.randn(size, generator=g) for name in case.injected}
    x, x2 = z.to(case.dtype).split([channels - case.second, case.second], 1)
    if case.last:
        form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x, x2, dy = (v.to(memory_format=form) for v in (x, x2, dy))
    return dy, x, weight, bias, given | {"x2": x2 if case.second else None}


def tiles_of(case):
    """The case's path, with tiles small enough to need several."""
    _, channels, *space = case.shape
    pixels = torch.Size(space).numel()
    if case.path == "one pass":
        slab = tiles.slabs(channels, channels // case.groups, torch.finfo(case.dtype).bits // 8, case.last)[0]
        return tiles.Tiles(tiles.power(slab), tiles.power(pixels), 1, 1, 1, slab)
    block_c, block_p, steps = WALKS[case.path]
    return tiles.Tiles(block_c, block_p, 1, steps, tiles.blocks(pixels, block_p * steps))


def oracle(case, dy, x, weight, bias, given, eps=1e-5):
    """y, statistics, dz and the three sums in float64; and for each the size of what was added up."""

    def wide(v, default):
        v = torch.full((1,), default) if v is None else v
        return v.double().reshape(*v.shape, *(1,) * (len(case.shape) - 2))

    x2 = given["x2"]
    z = (x if x2 is None else torch.cat([x, x2], 1)).double() + wide(given.get("add"), 0.0)
    z.requires_grad_()
    parts = z.reshape(len(z), case.groups, -1)
    mean, var = parts.mean(2), parts.var(2, correction=0)
    rstd = (var + eps).rsqrt()
    xhat = ((parts - mean[..., None]) * rstd[..., None]).reshape(z.shape)
    n = (xhat * wide(weight, 1.0) + wide(bias, 0.0)) * (1 + wide(given.get("scale"), 0.0)) + wide(
        given.get("shift"), 0.0
    )
    y = functional.silu(n) if case.act else n
    dn, dz = torch.autograd.grad(y, (n, z), dy.double())
    terms = [v.flatten(2) for v in (dn, dn * xhat, dz)]
    sums = torch.stack([v.sum(2) for v in terms], 2)
    sizes = torch.stack([v.abs().sum(2) for v in terms], 2).amax((0, 1)).clamp_min(1e-3)
    return y.detach(), mean.detach(), rstd.detach(), dz, sums, sizes


def error(got, wanted):
    return (got.double() - wanted).abs().max().item() if wanted.numel() else 0.0


def bound(case, wanted, torch_s, times):
    """`times` torch's own error, which is huge where the mean is, but no more than this part of the largest number."""
    part = {FP32: 2**-22, FP16: 2**-11, BF16: 2**-8}[case.dtype] * wanted.abs().max().item()
    return times * min(torch_s, part) + part


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case):
    dy, x, weight, bias, given = tensors(case)
    y64, mean, rstd, dz, sums64, sizes = oracle(case, dy, x, weight, bias, given)
    inputs = [v.detach().requires_grad_() for v in (x, given["x2"]) if v is not None]
    named = given | ({"x2": inputs[1]} if case.second else {})
    torch_y = group_norm_silu_ref(inputs[0], case.groups, weight, bias, **named, act=case.act)
    torch_dz = torch.cat(torch.autograd.grad(torch_y, inputs, dy), 1)

    numbers = Given.of(x, given["x2"], weight, bias, *(given.get(k) for k in ("add", "scale", "shift")))
    plan = tiles_of(case)
    y, stats = group_norm_silu_triton.forward(numbers, case.groups, 1e-5, case.act, plan)
    assert y.stride() == torch.empty(case.shape).to(memory_format=layout(x)).stride()
    assert error(y, y64) <= bound(case, y64, error(torch_y, y64), 2)
    deviation = rstd.max().reciprocal().item()
    assert error(stats[..., 0].double() + stats[..., 1].double(), mean) <= 3e-7 * deviation * (1 + case.outlier / 8)
    assert error(stats[..., 2] / rstd, torch.ones(())) <= 6e-7

    dx, dx2, sums = group_norm_backward_triton.backward(numbers, dy, stats, case.groups, case.act, plan)
    assert (dx.dtype, dx.stride()) == (x.dtype, torch.empty_like(x, memory_format=layout(x)).stride())
    got = torch.cat([dx, dx2], 1) if case.second else dx
    assert error(got, dz) <= bound(case, dz, error(torch_dz, dz), 3)
    for k in range(3):
        assert error(sums[..., k], sums64[..., k]) <= 1e-6 * sizes[k], k


def test_more_partial_sums_than_a_block_adds_up_at_a_time(monkeypatch):
    monkeypatch.setattr(tiles, "ENTRIES", 8)
    test_against_float64(Case((1, 20, 7, 7), 2, path="short walk", second=5))


@pytest.mark.parametrize("path", ["one pass", "walk"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_in_its_image(path, bad, last):
    case = Case((2, 12, 5, 7), 3, second=6, path=path, last=last)
    dy, x, weight, bias, given = tensors(case)

    def run(x):
        numbers = Given.of(x, given["x2"], weight, bias, *(given.get(k) for k in ("add", "scale", "shift")))
        y, stats = group_norm_silu_triton.forward(numbers, 3, 1e-5, True, tiles_of(case))
        return [y, stats, *group_norm_backward_triton.backward(numbers, dy, stats, 3, True, tiles_of(case))]

    whole, broken = run(x), x.clone()
    broken[1, 3, 2, 2] = bad
    for a, b in zip(whole, run(broken), strict=True):
        assert torch.equal(a[0], b[0])
        # groups do not touch either: the broken one is channels 0 to 3, and x2 begins with channel 6
        first = {12: 4, 3: 1, 6: 0 if a is whole[3] else 4}[a.shape[1]]
        assert torch.equal(a[1, first:], b[1, first:])
        assert not b[1, :first].isfinite().any()


STRANGE = {
    "transposed": lambda x: x.transpose(2, 3),
    "sliced channels": lambda x: x[:, 3:15],
    "sliced pixels": lambda x: x[..., 1:],
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "channels last, sliced": lambda x: x.to(memory_format=torch.channels_last)[:, :12],
    "permuted": lambda x: x.permute(1, 0, 2, 3)[:3],
}


@pytest.mark.parametrize("name", STRANGE)
def test_strides(name):
    whole = torch.randn(2, 18, 6, 6, generator=torch.Generator().manual_seed(0))
    x = STRANGE[name](whole)
    channels = x.shape[1]
    groups = 2 if channels == 2 else 3
    y, stats = group_norm_silu_triton.run(x, groups, None, None)
    wanted = group_norm_silu_ref(x.double(), groups, None, None)
    assert y.stride() == torch.empty_like(x, memory_format=layout(x)).stride()
    assert error(y, wanted) <= 1e-6
    dy = STRANGE[name](torch.randn(2, 18, 6, 6, generator=torch.Generator().manual_seed(1)))
    other = torch.randn(*x.shape[:1], 3, *x.shape[2:])
    for x2 in (None, other, other.to(memory_format=torch.channels_last)):
        leaf = x.double().requires_grad_()
        grad = dy if x2 is None else torch.cat([dy, x2], 1)
        y, stats = group_norm_silu_triton.run(x, 1, None, None, x2=x2)
        (wanted,) = torch.autograd.grad(
            group_norm_silu_ref(leaf, 1, None, None, x2=None if x2 is None else x2.double()), leaf, grad.double()
        )
        assert error(group_norm_silu_triton.run_backward(grad, x, stats, 1, None, None, x2=x2)[0], wanted) <= 2e-6


@pytest.mark.parametrize("path", ["one pass", "walk"])
@pytest.mark.parametrize("last", [False, True])
def test_slices_of_a_wide_row_are_read_where_they_lie(path, last):
    case = Case((2, 12, 5, 7), 3, second=6, path=path, last=last)
    dy, x, weight, bias, given = tensors(case)
    x2, dense = given.pop("x2"), list(given.values())
    found = []
    for small in (dense, [laid(v, "sliced") for v in dense]):
        numbers = Given.of(x, x2, weight, bias, *small)
        assert all(a is b for a, b in zip(numbers.small[2:], small, strict=True))
        y, stats = group_norm_silu_triton.forward(numbers, 3, 1e-5, True, tiles_of(case))
        back = group_norm_backward_triton.backward(numbers, dy, stats, 3, True, tiles_of(case))
        options = {"act": True} | {k: v[:, :6] for k, v in zip(given, small, strict=True)}
        injected = inject_triton.run(x, **options), *inject_triton.run_backward(dy[:, :6], x, **options)
        found.append([y, stats, *back, *injected])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", [(0, 12, 4, 4), (2, 12, 0, 4), (2, 12, 0), (0, 12, 0)])
def test_empty(shape):
    x, weight, add = torch.zeros(shape), torch.ones(12), torch.ones(12)
    y, stats = group_norm_silu_triton.run(x, 3, weight, None, add=add)
    dx, dx2, sums = group_norm_silu_triton.run_backward(x, x, stats, 3, weight, None, add=add)
    assert (y.shape, stats.shape, dx.shape, dx2.shape) == (x.shape, (len(x), 3, 3), x.shape, (0,))
    assert torch.equal(sums, torch.zeros(len(x), 12, 3))
    assert inject_triton.run(x, add=add).shape == x.shape
    dx, sums = inject_triton.run_backward(x, x, add=add)
    assert dx.shape == x.shape
    assert torch.equal(sums, torch.zeros(len(x), 12, 2))
    none = group_norm_silu_triton.run(torch.zeros(2, 4, 3), 2, None, None, x2=torch.zeros(2, 0, 3))
    assert torch.equal(none[0], torch.zeros(2, 4, 3))


def test_repeats_are_bit_equal():
    case = Case((2, 12, 5, 7), 3, second=6, path="walk")
    _, x, weight, bias, given = tensors(case)
    numbers = Given.of(x, given["x2"], weight, bias, *(given.get(k) for k in ("add", "scale", "shift")))
    first = group_norm_silu_triton.forward(numbers, 3, 1e-5, True, tiles_of(case))
    again = group_norm_silu_triton.forward(numbers, 3, 1e-5, True, tiles_of(case))
    assert all(map(torch.equal, first, again))
