"""group_norm_silu: ours against eager and compiled PyTorch in both layouts, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Case
from fastdiff.ops import dispatch, group_norm_silu

SHAPES = ((4, 256, 32, 32), (1, 320, 64, 64))
# where a call costs as much as its arithmetic
SMALL = ((1, 1280, 8, 8), (1, 256, 4, 4))
GROUPS = 32
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# ours may err twice (gradients: three times) as much as PyTorch does
FACTOR, FACTOR_OF_GRADIENTS = 2.0, 3.0


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a network without fused kernels does, in its own dtype."""
    return functional.silu(functional.group_norm(x, GROUPS, weight, bias))


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fastdiff.ops.group_norm_silu_{backend}")


def _within(got: Tensor, own: Tensor, exact: Tensor, factor: float) -> float:
    """The largest error of ours, once it is known to be at most `factor` times PyTorch's."""
    ours, theirs = (float((v.double() - exact).abs().max()) for v in (got, own))
    assert ours <= factor * theirs + 1e-6, (ours, theirs)
    return ours


def forward_case(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, *, device: str, backend: str, compiled: bool
) -> Case:
    """One shape, layout and dtype."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(device, dtype).to(memory_format=LAYOUTS[layout])
    weight, bias = (torch.randn(shape[1], generator=g).to(device) for _ in range(2))
    own = weight.to(dtype), bias.to(dtype)
    kernels = _kernels(backend)
    # with the checks and the choice that users pay for, where the choice is this backend
    taken = group_norm_silu if dispatch.chosen("group_norm_silu", x, GROUPS, weight, bias) == backend else kernels.run
    variants: dict[str, Any] = {
        f"ours ({backend})": lambda: taken(x, GROUPS, weight, bias),
        "eager": lambda: _plain(x, *own),
    }
    if compiled:
        whole = torch.compile(_plain, fullgraph=True, dynamic=False)
        variants["compiled"] = lambda: whole(x, *own)

    def check() -> float:
        exact = _plain(x.double(), weight.double(), bias.double())
        theirs = _plain(x.float(), weight, bias).to(dtype)
        return _within(kernels.run(x, GROUPS, weight, bias)[0], theirs, exact, FACTOR)

    title = f"group_norm_silu {shape} {layout} {str(dtype)[6:]}"
    return Case(title, f"ours ({backend})", variants, check, 2 * x.element_size() * x.numel())


def backward_case(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, *, device: str, backend: str, compiled: bool
) -> Case:
    """Gradients of x, weight and bias, each side from what its own forward saved."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=g).to(device, dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=g).to(device) for _ in range(2))
    kernels = _kernels(backend)
    stats = kernels.run(x, GROUPS, weight, bias)[1]

    def ours() -> tuple[Tensor, ...]:
        dx, _, sums = kernels.run_backward(dy, x, stats, GROUPS, weight, bias)
        dbias, dweight, _ = sums.sum(0).unbind(1)
        return dx, dweight, dbias

    def saved(function: Any, to: torch.dtype) -> Any:
        leaves = [v.detach().to(to).requires_grad_() for v in (x, weight, bias)]
        with torch.enable_grad():
            y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy.to(to), retain_graph=True)

    eager = saved(_plain, dtype)
    variants: dict[str, Any] = {f"ours ({backend})": ours, "eager": eager}
    if compiled:
        variants["compiled"] = saved(torch.compile(_plain, fullgraph=True, dynamic=False), dtype)

    def check() -> float:
        # gradients of weight and bias are sums over many numbers: compared by their size
        exact, theirs = saved(_plain, torch.float64)(), saved(_plain, torch.float32)()
        scaled = [
            tuple(v / wanted.abs().max() for v in (got.double(), own.to(got.dtype).double(), wanted))
            for got, own, wanted in zip(ours(), theirs, exact, strict=True)
        ]
        return max(_within(*v, FACTOR_OF_GRADIENTS) for v in scaled)

    title = f"group_norm_silu backward {shape} {layout} {str(dtype)[6:]}"
    return Case(title, f"ours ({backend})", variants, check, 3 * x.element_size() * x.numel())


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    if backend == "reference":
        return
    how = {"device": device, "backend": backend, "compiled": not quick}
    for shape in SHAPES[:1] if quick else SHAPES:
        for layout in LAYOUTS:
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                yield forward_case(shape, layout, dtype, **how)
                yield backward_case(shape, layout, dtype, **how)
    for shape in () if quick else SMALL:
        for layout in LAYOUTS:
            yield forward_case(shape, layout, torch.float32, **how)
