"""LayerNorm, a linear layer and its gate on CPUs: `fastdiff.ops.norm_linear` by csrc/cpu/linear.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.tape import empty, recording


def run(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    gate: bool,
    bias: Tensor | None,
    *,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """The result by csrc/cpu/linear.cpp."""
    n, tokens, channels = x.shape
    apart = native.tokens_apart(x)
    if apart is None:
        x, apart = x.contiguous(), channels
    weight = native.dense(weight, torch.float32)
    bias, norm_weight, norm_bias = map(native.per_channel, (bias, norm_weight, norm_bias))
    residual = None if residual is None else residual.contiguous()
    y = empty((n, tokens, outputs), torch.float32)
    address = native.address
    call = (
        *(x.data_ptr(), apart, n * tokens, channels, norm, eps, address(norm_weight), address(norm_bias)),
        *(weight.data_ptr(), address(bias), outputs, gate, address(residual), y.data_ptr()),
    )
    if (tape := recording()) is not None:
        tape.linear(call, x, residual)
    native.cpu.linear(call, torch.get_num_threads())
    return y


def refuses(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    gate: bool,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    **given: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    for v in (x, weight, residual):
        if v is not None and v.dtype is not torch.float32:
            return f"the cpp kernel takes float32, got {v.dtype}"
    others = (v for v in given.values() if isinstance(v, Tensor))
    return native.refuses(x, weight, bias, residual, *others)
