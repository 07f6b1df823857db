"""GroupNorm, the injection of the time embedding, and SiLU, in one op.

    z = cat([x, x2], 1) + add                                     add: the embedding in front of the norm
    n = (z - mean_g(z)) / sqrt(var_g(z) + eps) * weight + bias    mean and variance over (C / groups, *spatial)
    y = silu(n (1 + scale) + shift)                               scale, shift: the embedding behind the norm

Sources: Wu & He 2018 (GroupNorm); Ho 2020 (`add`); Nichol & Dhariwal 2021 (`scale`, `shift`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import cuda, dispatch, jit, library


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C) to something that broadcasts over x (N, C, *spatial)."""
    return v.reshape(*v.shape, *(1,) * (x.ndim - 2))


def group_norm_silu_ref(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """The formula above in plain PyTorch; statistics and arithmetic in fp32 at least, result in x's dtype."""
    z = x if x2 is None else torch.cat([x, x2], 1)
    wide = torch.promote_types(z.dtype, torch.float32)
    y = z.to(wide)
    if add is not None:
        y = y + _per_channel(add.to(wide), y)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    if bias is not None and bias.requires_grad and weight is None:
        # PyTorch 2.13 has no gradient of a bias alone
        weight = torch.ones_like(bias)
    if not y.requires_grad and any(p is not None and p.requires_grad for p in (weight, bias)):
        # and dies in the gradient of the parameters alone where y is channels_last
        y = y.contiguous()
    y = functional.group_norm(y, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _per_channel(scale.to(wide), y))
    if shift is not None:
        y = y + _per_channel(shift.to(wide), y)
    return (functional.silu(y) if act else y).to(x.dtype)


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of the result: channels_last where x is dense in it, and not in both."""
    if x.is_contiguous():
        return torch.contiguous_format
    for ndim, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=form):
            return form
    return torch.contiguous_format


def check_numbers(op: str, x: Tensor, channels: int, *, per_image: bool, **given: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not (channels,), nor, where they may differ by image, (N, channels)."""
    for name, v in given.items():
        # size by size: a traced size equals none inside a tuple
        if v is None or (
            v.ndim in ((1, 2) if per_image else (1,))
            and v.shape[-1] == channels
            and (v.ndim == 1 or v.shape[0] == x.shape[0])
        ):
            continue
        accepted = f"({channels},)" + (f" or {(x.shape[0], channels)}" if per_image else "")
        raise ValueError(f"{op}: {name} is {tuple(v.shape)}; accepted: {accepted} for x {tuple(x.shape)}")


def _fake(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x2: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    y = torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout(x))
    return y, x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor, stats: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None,
    x2: Tensor | None = None, *_: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = layout(x)
    dx2 = x.new_empty(0) if x2 is None else torch.empty_like(x2, memory_format=form)
    return torch.empty_like(x, memory_format=form), dx2, stats.new_empty((*dy.shape[:2], 3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, ctx.eps, x2, add, scale, shift, ctx.act = inputs
    ctx.save_for_backward(output[1], x, weight, bias, x2, add, scale, shift)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    stats, *inputs = ctx.saved_tensors
    grads = _again(ctx, dy, inputs) if torch.is_grad_enabled() else _once(ctx, dy, stats, *inputs)
    dx, dweight, dbias, dx2, dadd, dscale, dshift = grads
    return dx, None, dweight, dbias, None, dx2, dadd, dscale, dshift, None


def _again(ctx: Any, dy: Tensor, inputs: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients in torch ops, which can be differentiated again."""

    def formula(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, x2: Tensor | None, *injected: Tensor | None
    ) -> Tensor:
        given = dict(zip(("add", "scale", "shift"), injected, strict=True))
        return group_norm_silu_ref(x, ctx.groups, weight, bias, eps=ctx.eps, x2=x2, act=ctx.act, **given)

    return library.grads_of(formula, inputs, dy)


def _once(
    ctx: Any,
    dy: Tensor,
    stats: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> list[Tensor | None]:
    """The gradients by the kernel, which leaves three sums over the pixels; the small ones follow from those.

    s1 = sum_p dn,  s2 = sum_p dn xhat,  s3 = sum_p dz;   n is the argument of the SiLU, z = cat([x, x2], 1) + add.
    """
    run = library.registered("group_norm_silu_backward", ctx.backend)
    dx, dx2, sums = run(dy, x, stats, ctx.groups, weight, bias, x2, add, scale, shift, ctx.act)
    s1, s2, s3 = sums.unbind(2)
    factor = 1.0 if scale is None else 1 + scale.to(sums.dtype)
    dscale = None
    if scale is not None:
        n = s2 if weight is None else weight.to(sums.dtype) * s2
        dscale = n if bias is None else n + bias.to(sums.dtype) * s1
    return [
        dx,
        library.shaped_like(weight, factor * s2),
        library.shaped_like(bias, factor * s1),
        None if x2 is None else dx2,
        library.shaped_like(add, s3),
        library.shaped_like(scale, dscale),
        library.shaped_like(shift, s1),
    ]


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """silu(GroupNorm(cat([x, x2], 1) + add) (1 + scale) + shift), see the head of this file.

    x (N, C, *spatial) with any number of spatial axes; x2 (N, C2, *spatial) is normalised as if concatenated behind x;
    weight, bias (C + C2,); add, scale, shift (C + C2,) or (N, C + C2). Returns (N, C + C2, *spatial) in x's dtype.
    Channels_last in, channels_last out. Twice differentiable in every tensor. Raises ValueError when the channels do
    not divide into `groups` or shapes do not fit. Wu & He 2018; Nichol & Dhariwal 2021, section 4.
    """
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    if groups < 1 or channels % groups:
        raise ValueError(
            f"group_norm_silu: groups={groups} does not divide the {channels} channels of x; pass a divisor"
        )
    if x2 is not None and (x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]):
        raise ValueError(
            f"group_norm_silu: x2 {tuple(x2.shape)} does not go beside x {tuple(x.shape)}; accepted: the same images "
            "and the same size"
        )
    check_numbers("group_norm_silu", x, channels, per_image=False, weight=weight, bias=bias)
    check_numbers("group_norm_silu", x, channels, per_image=True, add=add, scale=scale, shift=shift)
    given = {"eps": eps, "x2": x2, "add": add, "scale": scale, "shift": shift, "act": act}
    y: Tensor = library.call("group_norm_silu", x, groups, weight, bias, **given)[0]
    return y


def _reference(*args: Any, **given: Any) -> tuple[Tensor]:
    return (group_norm_silu_ref(*args, **given),)


library.describe(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? x2, Tensor? add, "
    "Tensor? scale, Tensor? shift, bool act) -> (Tensor, Tensor)",
    _fake,
    setup=_setup,
    backward=_backward,
)
library.describe(
    "group_norm_silu_backward",
    "(Tensor dy, Tensor x, Tensor stats, int groups, Tensor? weight, Tensor? bias, Tensor? x2, Tensor? add, "
    "Tensor? scale, Tensor? shift, bool act) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
dispatch.register("group_norm_silu", "reference", _reference)
library.kernel("group_norm_silu", "cpp")
library.kernel("group_norm_silu", "triton", by_name=jit.UNPROVEN)
library.kernel("group_norm_silu", "cuda", by_name=cuda.COMPILED_ONLY)
