"""The injection of the time embedding where no norm stands beside it.

    y = (x + add) (1 + scale) + shift,  then silu where asked,  then + residual

add, scale, shift hold one number a channel, or one an image and channel; residual is an image as x is: with it and a
convolution's bias as `add`, the end of a ResBlock is one pass.

Sources: Ho 2020 (`add`); Nichol & Dhariwal 2021, section 4 (`scale`, `shift`); Perez 2018 (FiLM).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import cuda, dispatch, jit, library
from fastdiff.ops.group_norm_silu import check_numbers, layout


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(*v.shape, *(1,) * (x.ndim - 2))


def inject_ref(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """The formula above in plain PyTorch; arithmetic in fp32 at least, result in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if add is not None:
        y = y + _per_channel(add.to(wide), y)
    if scale is not None:
        y = y * (1 + _per_channel(scale.to(wide), y))
    if shift is not None:
        y = y + _per_channel(shift.to(wide), y)
    y = functional.silu(y) if act else y
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=layout(x))


def _fake_backward(dy: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake(x), x.new_empty((*x.shape[:2], 2), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, residual, ctx.act = inputs
    # no gradient depends on its numbers
    ctx.residual = None if residual is None else residual.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = _again(ctx, dy, inputs) if torch.is_grad_enabled() else _once(ctx, dy, *inputs)
    return (*grads, None if ctx.residual is None else dy.to(ctx.residual), None)


def _again(ctx: Any, dy: Tensor, inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of all but the residual in torch ops, which can be differentiated again."""

    def formula(x: Tensor, add: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return inject_ref(x, add=add, scale=scale, shift=shift, act=ctx.act)

    return library.grads_of(formula, inputs, dy)


def _once(
    ctx: Any, dy: Tensor, x: Tensor, add: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor | None]:
    """The gradients by the kernel: dx, and s1 = sum_p dn, s2 = sum_p dn (x + add) of the SiLU's argument n."""
    dx, sums = library.registered("inject_backward", ctx.backend)(dy, x, add, scale, shift, ctx.act)
    s1, s2 = sums.unbind(2)
    dadd = s1 if scale is None else (1 + scale.to(s1.dtype)) * s1
    return [dx, library.shaped_like(add, dadd), library.shaped_like(scale, s2), library.shaped_like(shift, s1)]


def inject(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """(x + add) (1 + scale) + shift, then SiLU with act=True, then + residual, in one pass; in x's dtype and layout.

    x, residual (N, C, *spatial), each of any layout and float dtype (x's own costs residual no copy); add, scale,
    shift (C,) or (N, C). Twice differentiable in every tensor. Raises ValueError where shapes do not fit, or residual
    lies on another device than x. Ho 2020; Nichol & Dhariwal 2021, section 4.
    """
    check_numbers("inject", x, x.shape[1], per_image=True, add=add, scale=scale, shift=shift)
    if residual is not None and (residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"inject: residual is {tuple(residual.shape)} on {residual.device}; accepted: {tuple(x.shape)} on "
            f"{x.device}, as x"
        )
    y: Tensor = library.call("inject", x, add=add, scale=scale, shift=shift, residual=residual, act=act)
    return y


library.describe(
    "inject",
    "(Tensor x, Tensor? add, Tensor? scale, Tensor? shift, Tensor? residual, bool act) -> Tensor",
    _fake,
    setup=_setup,
    backward=_backward,
)
library.describe(
    "inject_backward",
    "(Tensor dy, Tensor x, Tensor? add, Tensor? scale, Tensor? shift, bool act) -> (Tensor, Tensor)",
    _fake_backward,
)
dispatch.register("inject", "reference", inject_ref)
library.kernel("inject", "cpp")
library.kernel("inject", "triton", by_name=jit.UNPROVEN)
library.kernel("inject", "cuda", by_name=cuda.COMPILED_ONLY)
