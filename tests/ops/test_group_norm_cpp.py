"""The C++ kernels of group_norm_silu and inject against float64: values, gradients, layouts, threads, NaN."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.group_norm_silu import group_norm_silu_ref
from fastdiff.ops.inject import inject_ref

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")

NAMES = ("weight", "bias", "add", "scale", "shift")
SMALL = {"add", "scale", "shift"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    shape: tuple[int, ...] = (2, 12, 5, 7)
    groups: int = 4
    split: int = 0  # channels of x, the others are x2's; 0 is no x2
    given: tuple[str, ...] = ("weight", "bias")
    per_image: bool = False
    last: bool = False
    act: bool = True
    dtype: torch.dtype = torch.float32
    mean: float = 0.0


CASES = {
    "plain": Case(),
    "last": Case(last=True),
    "straddling": Case(split=5, given=NAMES, per_image=True),
    "straddling last": Case(split=5, given=NAMES, per_image=True, last=True),
    "add": Case(given=("add",)),
    "scale": Case(given=("scale", "shift"), per_image=True, last=True),
    "no act": Case(given=NAMES, act=False),
    "group 6": Case((3, 24, 8, 8), 4, last=True),
    "group 10": Case((1, 40, 16, 16), 4, split=17, last=True),
    "group 20": Case((2, 40, 33), 2),
    "prime channels": Case((2, 37, 4, 4), 37, last=True),
    "one group": Case((2, 35, 9, 9), 1, last=True, split=19),
    "prime NCHW": Case((2, 37, 17), 1, split=13, given=NAMES),
    "volume": Case((2, 18, 3, 4, 5), 3, last=True, given=NAMES),
    "one pixel": Case((5, 48), 8),
    "one pixel 2d": Case((5, 48, 1, 1), 8, split=21, given=NAMES),
    "long rows": Case((1, 4, 150, 250), 2, given=("weight", "add")),
    "many cells last": Case((1, 20, 70, 70), 5, last=True, given=NAMES),
    "wide last": Case((2, 320, 8, 8), 32, last=True, split=192),
    "far mean": Case((2, 24, 16, 16), 4, mean=1e4),
    "far mean last": Case((2, 24, 16, 16), 4, mean=1e4, last=True, given=NAMES),
    "bf16": Case(dtype=torch.bfloat16, given=NAMES),
    "bf16 last": Case((2, 40, 9, 9), 4, dtype=torch.bfloat16, last=True, split=11),
    "fp16": Case(dtype=torch.float16, split=7),
    "fp16 last": Case((2, 40, 9, 9), 4, dtype=torch.float16, last=True, given=NAMES),
    "no images": Case((0, 8, 4, 4), 2),
    "no pixels": Case((2, 8, 0, 4), 2, given=NAMES),
    "threads": Case((4, 64, 24, 24), 8, last=True, given=NAMES, per_image=True),
    "threads NCHW": Case((3, 64, 24, 24), 8, split=20),
}


def arguments(case: Case, seed: int = 0) -> dict[str, Any]:
    """Tensors of a case in its dtype and layout, the small ones in fp32."""
    g = torch.Generator().manual_seed(seed)
    channels = case.shape[1]
    z = torch.randn(case.shape, generator=g) + case.mean
    parts = list(z.to(case.dtype).split([case.split, channels - case.split] if case.split else [channels], 1))
    form = (
        {4: torch.channels_last, 5: torch.channels_last_3d}[len(case.shape)] if case.last else torch.contiguous_format
    )
    parts = [p.clone(memory_format=form) for p in parts]
    args: dict[str, Any] = dict.fromkeys(("x2", *NAMES)) | {"x": parts[0], "groups": case.groups, "act": case.act}
    args |= {"x2": parts[1]} if case.split else {}
    for name in case.given:
        shape = (case.shape[0], channels) if case.per_image and name in SMALL else (channels,)
        args[name] = torch.randn(shape, generator=g)
    return args


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.detach().to(dtype) if isinstance(v, Tensor) else v for k, v in args.items()}


def by_reference(args: dict[str, Any], dy: Tensor, formula: Any) -> dict[str, Tensor]:
    """y and the gradients by autograd of the reference's formula, in the dtypes of args."""
    args = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in args.items()}
    y = formula(**args)
    wanted = {k: v for k, v in args.items() if isinstance(v, Tensor)}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


def by_kernel(args: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """The same by the kernels' own functions, with the sums left as they are."""
    from fastdiff.ops import group_norm_silu_cpp as cpp

    args = dict(args)
    first = (args.pop("x"), args.pop("groups"), args.pop("weight"), args.pop("bias"))
    y, stats = cpp.run(*first, **args)
    dx, dx2, sums = cpp.run_backward(dy, first[0], stats, *first[1:], **args)
    results = {"y": y, "stats": stats, "dx": dx, "sums": sums}
    return results | ({} if args["x2"] is None else {"dx2": dx2})


def small_grads(sums: Tensor, args: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of the small arguments from the kernel's sums."""
    s1, s2, s3 = sums.unbind(2)
    scale, weight, bias = (args[k] for k in ("scale", "weight", "bias"))
    factor = 1 if scale is None else 1 + scale
    n = (1 if weight is None else weight) * s2 + (0 if bias is None else bias) * s1
    grads = {"weight": factor * s2, "bias": factor * s1, "add": s3, "scale": n, "shift": s1}
    return {f"d{k}": v.sum(0) if args[k].ndim == 1 else v for k, v in grads.items() if args[k] is not None}


def compare(got: Tensor, own: Tensor, exact: Tensor, factor: float, name: str) -> None:
    """The largest error is at most `factor` times PyTorch's own."""
    if exact.numel() == 0:
        assert got.shape == exact.shape
        return
    if exact.isnan().all():
        # PyTorch's sums over no pixels; they are empty
        assert not got.any(), name
        return
    size = float(exact.abs().max())
    ours, theirs = (float((v.double() - exact).abs().max()) for v in (got, own))
    assert ours <= factor * theirs + 2e-7 * size, f"{name}: error {ours:.1e}, PyTorch's {theirs:.1e}, size {size:.1e}"


@pytest.fixture(params=[1, 3])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, threads: int) -> None:
    case = CASES[name]
    args = arguments(case)
    dy = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    got = by_kernel(args, dy)
    got |= small_grads(got["sums"], args)
    exact = by_reference(cast(args, torch.float64), dy.double(), group_norm_silu_ref)
    own = by_reference(args, dy, group_norm_silu_ref)
    for key, wanted in exact.items():
        compare(got[key], own[key], wanted, 2 if key == "y" else 3, f"{name} {key}")
    z = torch.cat([args["x"], args["x2"]], 1) if case.split else args["x"]
    assert got["y"].shape == z.shape
    assert got["y"].dtype == got["dx"].dtype == case.dtype
    for key, like in (("y", args["x"]), ("dx", args["x"]), ("dx2", args["x2"])):
        if like is not None:
            assert got[key].is_contiguous() == like.is_contiguous()
            assert got[key].is_contiguous() or got[key].stride()[1] == 1


@pytest.mark.parametrize("last", [False, True])
def test_statistics(last: bool) -> None:
    args = arguments(Case((2, 20, 30, 30), 4, last=last, given=("add",), mean=1e4, split=7))
    stats = by_kernel(args, torch.ones(2, 20, 30, 30))["stats"].double()
    z = torch.cat([args["x"], args["x2"]], 1).double() + args["add"].double().reshape(20, 1, 1)
    z = z.reshape(2, 4, -1)
    rstd = 1 / (z.var(2, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(stats[..., 0] + stats[..., 1], z.mean(2), rtol=1e-11, atol=0)
    torch.testing.assert_close(stats[..., 2], rstd, rtol=2e-7, atol=0)


@pytest.mark.parametrize("last", [False, True])
def test_a_far_mean_costs_no_digits(last: bool) -> None:
    # PyTorch's own error is 1e-3 here, too wide a bound for a centre that is off by its rounding
    args = arguments(Case((2, 24, 16, 16), 4, last=last, given=("weight", "bias"), mean=1e4))
    got = by_kernel(args, torch.ones(2, 24, 16, 16))["y"].double()
    torch.testing.assert_close(got, group_norm_silu_ref(**cast(args, torch.float64)), rtol=0, atol=5e-6)


@pytest.mark.parametrize("last", [False, True])
def test_an_outlier_costs_no_digits(last: bool) -> None:
    args = arguments(Case((1, 32, 32, 32), 4, last=last, given=()))
    args["x"][:, :, 0, 0] += 1e3
    stats = by_kernel(args, torch.ones(1, 32, 32, 32))["stats"].double()
    z = args["x"].double().reshape(1, 4, -1)
    torch.testing.assert_close(stats[..., 2], 1 / (z.var(2, correction=0) + 1e-5).sqrt(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 64, 24, 24), (1, 32, 70, 70), (8, 16, 16, 16)])
def test_same_bits_for_any_threads_and_batch(shape: tuple[int, ...], last: bool) -> None:
    args = arguments(Case(shape, 8, last=last, given=NAMES, per_image=True))
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(by_kernel(args, dy))
    torch.set_num_threads(1)
    one = {k: v[:1] if isinstance(v, Tensor) and k in ("x", *SMALL) else v for k, v in args.items()}
    results.append(by_kernel(one, dy[:1]))
    for other in results[1:]:
        for key, value in other.items():
            assert torch.equal(value, results[0][key][: len(value)]), key


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_nan_stays_in_its_group(broken: float, last: bool) -> None:
    args = arguments(Case((3, 21, 9, 9), 3, split=10, last=last, given=NAMES))
    dy = torch.randn(3, 21, 9, 9)
    whole = by_kernel(args, dy)
    args["x"][1, 8, 3, 3] = broken
    got = by_kernel(args, dy)
    touched = torch.zeros(3, 21, dtype=torch.bool)
    touched[1, 7:14] = True
    for key in ("y", "sums"):
        assert torch.equal(got[key][~touched], whole[key][~touched]), key
    assert got["y"][touched].isnan().all()
    joined = torch.cat([got["dx"], got["dx2"]], 1)
    assert torch.equal(joined[~touched], torch.cat([whole["dx"], whole["dx2"]], 1)[~touched])
    assert joined[touched].isnan().all()


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (3, 33, 8, 8), (1, 40, 60, 60), (0, 3, 2, 2), (2, 3, 0, 4)])
def test_inject(shape: tuple[int, ...], dtype: torch.dtype, last: bool, act: bool) -> None:
    from fastdiff.ops import inject_cpp

    args = arguments(Case(shape, 1, given=tuple(sorted(SMALL)), per_image=True, last=last, act=act, dtype=dtype))
    args = {k: args[k] for k in ("x", "act", *SMALL)}
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = inject_cpp.run(**args)
    dx, sums = inject_cpp.run_backward(dy, **args)
    exact = by_reference(cast(args, torch.float64), dy.double(), inject_ref)
    own = by_reference(args, dy, inject_ref)
    s1, s2 = sums.unbind(2)
    got = {"y": y, "dx": dx, "dshift": s1, "dscale": s2, "dadd": (1 + args["scale"]) * s1}
    for key, wanted in exact.items():
        compare(got[key], own[key], wanted, 2 if key == "y" else 3, key)
    assert not y.numel() or y.stride() == dx.stride() == args["x"].stride()


def test_extreme_values() -> None:
    from fastdiff.ops import inject_cpp

    x = torch.tensor([-torch.inf, -2e38, -1e30, -128.0, -90.0, -87.5, -1e-30, 0.0, 1e-42, 88.0, 2e38, torch.inf])
    x = x.repeat(3).reshape(1, 4, 9)
    y = inject_cpp.run(x, act=True)
    torch.testing.assert_close(y, torch.nn.functional.silu(x), rtol=1e-6, atol=2e-38, equal_nan=True)


@pytest.mark.parametrize("change", ["sliced", "transposed", "expanded", "unaligned", "mixed layouts", "half numbers"])
def test_strange_tensors(change: str) -> None:
    args = arguments(Case((2, 12, 6, 6), 3, split=7, given=NAMES))
    dy = torch.randn(2, 12, 6, 6)
    if change == "sliced":
        args["x"] = torch.randn(2, 14, 8, 6)[:, 3:10, 1:7]
    if change == "transposed":
        args["x"], dy = args["x"].transpose(2, 3), dy.transpose(2, 3)
    if change == "expanded":
        args["x"], dy = args["x"][:1].expand(2, -1, -1, -1), torch.ones(()).expand(2, 12, 6, 6)
    if change == "unaligned":
        args["x"] = torch.randn(2 * 7 * 36 + 1)[1:].reshape(2, 7, 6, 6)
    if change == "mixed layouts":
        args["x2"] = args["x2"].to(memory_format=torch.channels_last)
    if change == "half numbers":
        args |= {k: args[k].to(torch.bfloat16) for k in NAMES}
    plain = {k: v.clone(memory_format=torch.contiguous_format) if isinstance(v, Tensor) else v for k, v in args.items()}
    plain |= {k: plain[k].float() for k in NAMES}
    wanted, got = by_kernel(plain, dy.contiguous()), by_kernel(args, dy)
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key
