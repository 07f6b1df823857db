"""Matrix products in float8 (e4m3), lossy: every number is rounded to four significant bits before it is multiplied.

    y = s_x s_w (q_x q_w^T) + bias,    q = e4m3(v / s)

s_w = max |w| / 448 is packed with the weight; s_x is the power of two with max |x| / s_x in [128, 256), found on the
device for every call, at least 2^-15. So for each product x w: |q s - v| <= max(2^-4 |v|, 2^-10 s).

Micikevicius 2022 (the format).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.nn.follow import Packer
from fastdiff.ops.library import records_grad

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST = 2.0**-15  # of s_x: 1 / s_x is a float16 too


def fits(inputs: int, outputs: int, packer: Packer) -> bool:
    """Whether torch._scaled_mm takes such a product: sizes of 16, floats of at most 32 bits, and hardware for it."""
    if inputs % 16 or outputs % 16 or packer.dtype == torch.float64:
        return False
    device = packer.device
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"


def weight_scale(w: Tensor) -> Tensor:
    """max |w| / 448, a float32 of no axes; 1 where w is zero."""
    largest = w.abs().amax().float() / LARGEST
    return torch.where(largest > 0, largest, 1.0)


def input_scale(*parts: Tensor) -> Tensor:
    """The power of two s with max |x| / s in [128, 256), at least LEAST; inf and NaN make it inf."""
    norms = [torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) for x in parts]
    largest = norms[0] if len(norms) == 1 else torch.maximum(*norms)
    # the exponent's bits alone are the power of two below
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    return (power / 128).clamp(min=LEAST)


def product(weight: Tensor, scale: Tensor, bias: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
    """y (M, outputs) in the parts' dtype, for x = cat(parts, 1), which is written in float8 only."""
    dtype, s = parts[0].dtype, input_scale(*parts)
    x = torch.empty(len(parts[0]), weight.shape[1], dtype=FP8, device=weight.device)
    at = 0
    for part in parts:
        x[:, at : at + part.shape[1]].copy_(part * (1 / s).to(dtype))
        at += part.shape[1]
    # cuBLAS adds no bias to a float32 result
    early = None if bias is None or dtype == torch.float32 else bias.to(dtype)
    y = torch._scaled_mm(x, weight.t(), s, scale, bias=early, out_dtype=dtype)
    return y if bias is None or early is not None else y + bias


class _Product(torch.autograd.Function):
    """`product`, and as its gradient that of the product with the packed weight, as if x had not been rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.widths = [x.shape[1] for x in parts]
        return product(weight, scale, bias, parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        dx = dy @ (weight.to(dy.dtype) * scale.to(dy.dtype))
        return None, None, None, *dx.split(ctx.widths, 1)


class Fp8Linear(nn.Module):
    """W x + bias in float8; W (outputs, inputs) and bias are stand-ins of `packer`."""

    def __init__(self, packer: Packer, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        # buffers: the parameters' dtype is the network's
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", packer.derive(lambda w: w / weight_scale(w), weight, dtype=FP8))
        self.register_buffer("scale", packer.derive(weight_scale, weight, dtype=torch.float32))
        self.bias = bias

    def forward(self, *parts: Tensor) -> Tensor:
        """(..., outputs) of x = cat(parts, -1), each (..., some of the inputs)."""
        lines = tuple(x.flatten(0, -2) for x in parts)
        if records_grad(*parts):
            y: Tensor = _Product.apply(self.weight, self.scale, self.bias, *lines)  # type: ignore[no-untyped-call]
        else:
            y = product(self.weight, self.scale, self.bias, lines)
        return y.view(*parts[0].shape[:-1], y.shape[-1])


class Fp8Shortcut(nn.Module):
    """W cat([x, skip], 1) + bias at every pixel by `product`, an Fp8Linear."""

    def __init__(self, product: Fp8Linear) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(N, outputs, *spatial), channels_last."""
        parts = [v.movedim(1, -1) for v in (x, skip) if v is not None]
        y: Tensor = self.product(*parts).movedim(-1, 1)
        return y
