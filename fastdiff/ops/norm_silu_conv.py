"""GroupNorm, SiLU, a convolution and what is added to its result, in one op.

    z = cat([x, x2], 1)
    h = silu(norm(z) (1 + scale) + shift)             groups = 0: h = z
    y = conv(repeated(h)) + bias + add + residual     repeated: nearest x2 where upsample
                                                      append: y = cat([y, h], 1)

The convolution is 3x3 or 1x1. On CPUs it is C++: 3x3 ones of stride 1 by Winograd's F(4x4, 3x3), with an error of a few
1e-6 of the result's norm where direct convolution has a few 1e-7; the others as matrix products. Weights come packed
(`pack`), as the kernels read them.

Sources: Lavin & Gray 2016 (Winograd); Ho 2020; Dhariwal & Nichol 2021.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import dispatch, library
from fastdiff.ops.group_norm_silu import check_numbers, group_norm_silu_ref

PANEL = 32
"""Outputs whose weights lie side by side."""


class Packed(NamedTuple):
    """The weights of a convolution as the kernels read them."""

    weight: Tensor
    """(panels, inputs size size, 32): panels of 32 outputs, zeros behind the last one's."""
    outputs: int
    size: int
    """3 or 1: of the window along each axis."""


def panels(weight: Tensor) -> Tensor:
    """(O, I, k, k) as Packed.weight, a view where no panel is padded, so that whoever writes it down copies once."""
    rows = weight.flatten(1)  # (O, I k k)
    if rows.shape[0] % PANEL:
        rows = functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2)


def pack(weight: Tensor) -> Packed:
    """Weights (O, I, 3, 3) or (O, I, 1, 1) as the kernels read them. Raises ValueError for other windows."""
    if weight.ndim != 4 or tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
        raise ValueError(f"norm_silu_conv: weight is {tuple(weight.shape)}; accepted: (O, I, 3, 3) and (O, I, 1, 1)")
    return Packed(panels(weight).contiguous(), weight.shape[0], weight.shape[2])


def unpack(packed: Packed) -> Tensor:
    """The weights (O, I, k, k) that were packed."""
    weight, outputs, size = packed
    rows = weight.transpose(0, 1).flatten(1)[:, :outputs]  # (I k k, O)
    return rows.t().reshape(outputs, -1, size, size)


def norm_silu_conv_ref(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    size: int,
    bias: Tensor | None,
    *,
    x2: Tensor | None = None,
    groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
    stride: int = 1,
    asymmetric: bool = False,
    append: bool = False,
    moments: Tensor | None = None,
    moments2: Tensor | None = None,
    measure: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula above in plain PyTorch, and mean and variance of its O outputs (N, O, 2) where asked for."""
    given = {"eps": eps, "x2": x2, "scale": scale, "shift": shift, "act": act}
    if groups:
        h = group_norm_silu_ref(x, groups, norm_weight, norm_bias, **given)  # type: ignore[arg-type]
    else:
        h = x if x2 is None else torch.cat([x, x2], 1)
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else h
    h = functional.pad(h, (0, 1, 0, 1)) if asymmetric else h
    kernel = unpack(Packed(weight, outputs, size)).to(h.dtype)
    y = functional.conv2d(h, kernel, None, stride, 0 if asymmetric else size // 2)
    for v in (bias, add):
        y = y if v is None else y + v.to(y.dtype).reshape(*v.shape, 1, 1)
    y = y if residual is None else y + residual.to(y.dtype)
    found = moments_ref(y) if measure else y.new_empty(0, dtype=torch.float64)
    return torch.cat([y, h], 1) if append else y, found


def moments_ref(x: Tensor) -> Tensor:
    """Mean and variance of each channel of each image (N, C, 2), float64."""
    flat = x.flatten(2).double()
    mean = flat.mean(2, keepdim=True)
    return torch.stack([mean.squeeze(2), (flat - mean).square().mean(2)], 2)


def result_shape(
    x: Tensor, outputs: int, size: int, *, upsample: bool, stride: int, asymmetric: bool
) -> tuple[int, int, int, int]:
    """(N, O, height, width) of the result."""
    pad = (1 if asymmetric else 2) if size == 3 else 0
    height, width = ((int(s) * (2 if upsample else 1) + pad - size) // stride + 1 for s in x.shape[2:])
    return x.shape[0], outputs, height, width


def _fake(
    x: Tensor, weight: Tensor, outputs: int, size: int, bias: Tensor | None, x2: Tensor | None, groups: int,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None,
    act: bool, add: Tensor | None, residual: Tensor | None, upsample: bool, stride: int, asymmetric: bool,
    append: bool, moments: Tensor | None, moments2: Tensor | None, measure: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, _, *image = result_shape(x, outputs, size, upsample=upsample, stride=stride, asymmetric=asymmetric)
    shape = (n, outputs + (weight.shape[1] if append else 0), *image)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty((x.shape[0], outputs, 2) if measure else (0,), dtype=torch.float64)


_TENSORS = ("x", "weight", "bias", "x2", "norm_weight", "norm_bias", "scale", "shift", "add", "residual")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = dict(zip(_NAMES, inputs, strict=True))
    ctx.save_for_backward(*(given.pop(name) for name in _TENSORS))
    # the norm takes its own statistics again: theirs are no way around x
    ctx.given = {**given, "moments": None, "moments2": None, "measure": False}
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """By the formula in torch ops, which can be differentiated again."""

    def formula(*tensors: Tensor | None) -> Tensor:
        given = {**ctx.given, **dict(zip(_TENSORS, tensors, strict=True))}
        first = [given.pop(name) for name in _NAMES[:5]]
        return norm_silu_conv_ref(*first, **given)[0]

    grads = dict(zip(_TENSORS, library.grads_of(formula, ctx.saved_tensors, dy), strict=True))
    return tuple(grads.get(name) for name in _NAMES)


def norm_silu_conv(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    *,
    groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
    stride: int = 1,
    asymmetric: bool = False,
    append: bool = False,
) -> Tensor:
    """conv(silu(norm(cat([x, x2], 1)) (1 + scale) + shift)) + bias + add + residual, see the head of this file.

    x (N, C, H, W), x2 (N, C2, H, W); weight (O, C + C2, k, k), k = 3 or 1, or packed (`fastdiff.ops.pack`) once for
    many calls; bias (O,); groups=0: no norm and no SiLU; norm_weight, norm_bias (C + C2,); scale, shift (C + C2,) or
    (N, C + C2); add (O,) or (N, O); residual as the result, (N, O, H', W'). The image is padded by k // 2 zeros;
    upsample (stride 1): every pixel is repeated 2x2 first; stride=2 halves, asymmetric: with one zero behind each axis
    and none in front; append (k = 1 and groups): h as further channels of the result. It is channels_last. Twice
    differentiable in every tensor. Raises ValueError for shapes that do not fit. Lavin & Gray 2016.
    """
    packed = weight if isinstance(weight, Packed) else pack(weight)
    check(x, packed, x2, groups, upsample, stride, asymmetric, append)
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    check_numbers("norm_silu_conv", x, channels, per_image=False, norm_weight=norm_weight, norm_bias=norm_bias)
    check_numbers("norm_silu_conv", x, channels, per_image=True, scale=scale, shift=shift)
    check_numbers("norm_silu_conv", x, packed.outputs, per_image=False, bias=bias)
    check_numbers("norm_silu_conv", x, packed.outputs, per_image=True, add=add)
    shape = result_shape(x, *packed[1:], upsample=upsample, stride=stride, asymmetric=asymmetric)
    if 0 in (*x.shape[2:], *shape[2:]):
        least = 2 if asymmetric else 1
        raise ValueError(
            f"norm_silu_conv: x is {tuple(x.shape)}; accepted: images of at least {least} x {least} pixels"
        )
    if residual is not None and residual.shape != shape:
        raise ValueError(f"norm_silu_conv: residual is {tuple(residual.shape)}; accepted: {shape}, as the result")
    return convolved(
        x, packed, bias, groups=groups, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, x2=x2, scale=scale,
        shift=shift, act=act, add=add, residual=residual, upsample=upsample, stride=stride, asymmetric=asymmetric,
        append=append,
    )[0]  # fmt: skip


def convolved(x: Tensor, packed: Packed, bias: Tensor | None, **given: Any) -> tuple[Tensor, Tensor]:
    """`norm_silu_conv` without its checks: the result, and with measure=True its moments (N, O, 2).

    moments, moments2: those of x and x2 where they are known, which saves reading both for the norm.
    """
    # the registered op has no defaults
    y, moments = library.call("norm_silu_conv", x, *packed, bias, **{**_DEFAULTS, **given})
    return y, moments


def check(
    x: Tensor, packed: Packed, x2: Tensor | None, groups: int, upsample: bool, stride: int, asymmetric: bool,
    append: bool,
) -> None:  # fmt: skip
    """Raise ValueError for what no convolution fits."""
    shape = tuple(x.shape)
    if x.ndim != 4:
        raise ValueError(f"norm_silu_conv: x is {shape}; accepted: (N, C, H, W)")
    if x2 is not None and (x2.shape[0] != shape[0] or x2.shape[2:] != x.shape[2:]):
        raise ValueError(
            f"norm_silu_conv: x2 {tuple(x2.shape)} does not go beside x {shape}; accepted: the same images and the "
            "same size"
        )
    channels = shape[1] + (0 if x2 is None else x2.shape[1])
    if packed.weight.shape[1] != packed.size**2 * channels:
        inputs = packed.weight.shape[1] // packed.size**2
        raise ValueError(f"norm_silu_conv: weight is for {inputs} channels, x (and x2) have {channels}")
    if groups < 0 or (groups and channels % groups):
        raise ValueError(
            f"norm_silu_conv: groups={groups} does not divide the {channels} channels; pass a divisor, or 0"
        )
    if append and (packed.size == 3 or not groups):
        raise ValueError("norm_silu_conv: append=True goes with a window of 1 behind a norm")
    if upsample and packed.size == 1:
        raise ValueError("norm_silu_conv: upsample=True goes with a 3x3 window")
    if stride not in (1, 2) or (packed.size == 1 and stride == 2):
        raise ValueError(f"norm_silu_conv: stride={stride} with a window of {packed.size}; accepted: 1, or 2 with 3x3")
    if asymmetric and stride == 1:
        raise ValueError("norm_silu_conv: asymmetric=True goes with stride=2")
    if stride == 2 and (upsample or groups or x2 is not None):
        raise ValueError("norm_silu_conv: stride=2 goes without upsample, groups and x2; run group_norm_silu in front")


library.describe(
    "norm_silu_conv",
    "(Tensor x, Tensor weight, int outputs, int size, Tensor? bias, Tensor? x2, int groups, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift, bool act, Tensor? add, Tensor? residual, "
    "bool upsample, int stride, bool asymmetric, bool append, Tensor? moments, Tensor? moments2, bool measure) "
    "-> (Tensor, Tensor)",
    _fake,
    setup=_setup,
    backward=_backward,
)
_NAMES = (
    *("x", "weight", "outputs", "size", "bias", "x2", "groups", "norm_weight", "norm_bias", "eps", "scale", "shift"),
    *("act", "add", "residual", "upsample", "stride", "asymmetric", "append", "moments", "moments2", "measure"),
)
_DEFAULTS: dict[str, Any] = norm_silu_conv_ref.__kwdefaults__ or {}
dispatch.register("norm_silu_conv", "reference", norm_silu_conv_ref)
library.kernel("norm_silu_conv", "cpp")
