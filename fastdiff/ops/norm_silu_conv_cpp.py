"""Norm, SiLU and convolution on CPUs: `fastdiff.ops.norm_silu_conv` by csrc/cpu/conv.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.norm_silu_conv import result_shape
from fastdiff.ops.tape import beside, empty, recording

LAST = torch.channels_last
POINTWISE, SAME, UPSAMPLED, STRIDED = range(4)


def _last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=LAST)


def measured(x: Tensor) -> Tensor:
    """Mean and variance of each channel of each image (N, C, 2), float64; x channels_last."""

    def measure(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        out = x.new_empty((n, channels, 2), dtype=torch.float64)
        native.cpu.moments(x.data_ptr(), n, height * width, channels, out.data_ptr(), torch.get_num_threads())
        return out

    return beside(measure, x)


def run(
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
    """The result, and its moments (N, O, 2) where asked for, by csrc/cpu/conv.cpp."""
    x = x.contiguous(memory_format=LAST)
    x2, residual = _last(x2), _last(residual)
    weight = native.dense(weight, torch.float32)
    small = (bias, add, norm_weight, norm_bias, scale, shift)
    bias, add, norm_weight, norm_bias, scale, shift = map(native.per_channel, small)
    n, first, height, width = x.shape
    channels = first if x2 is None else first + x2.shape[1]
    if groups:
        moments = measured(x) if moments is None else moments
        moments2 = measured(x2) if moments2 is None and x2 is not None else moments2
    shape = result_shape(x, outputs, size, upsample=upsample, stride=stride, asymmetric=asymmetric)
    y = empty((n, *shape[2:], outputs + channels if append else outputs), torch.float32).permute(0, 3, 1, 2)
    out = empty((n, outputs, 2) if measure else (0,), torch.float64)
    kind = POINTWISE if size == 1 else STRIDED if stride == 2 else UPSAMPLED if upsample else SAME
    address, apart = native.address, native.apart
    call = (
        *(kind, append, x.data_ptr(), address(x2), first, channels, n, height, width, groups, eps),
        *(address(norm_weight), 0, address(norm_bias), 0),
        *(address(scale), apart(scale), address(shift), apart(shift)),
        *(address(moments), address(moments2), act, weight.data_ptr(), y.data_ptr(), outputs, address(bias)),
        *(address(add), apart(add), address(residual), out.data_ptr() if measure else 0),
        *(stride, 0 if asymmetric else 1),
    )
    if (tape := recording()) is not None:
        tape.conv(call, x, x2, scale, shift, add, residual, moments, moments2)
    native.cpu.conv(call, torch.get_num_threads())
    return y, out


def refuses(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    size: int,
    bias: Tensor | None,
    *,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    **given: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    for v in (x, weight, x2, residual):
        if v is not None and v.dtype is not torch.float32:
            return f"the cpp kernel takes float32, got {v.dtype}"
    others = (v for v in given.values() if isinstance(v, Tensor))
    return native.refuses(x, weight, bias, x2, residual, *others)
