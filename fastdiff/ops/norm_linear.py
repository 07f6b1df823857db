"""LayerNorm, a linear layer, its gate and what is added to its result, in one op.

    h = norm(x) norm_weight + norm_bias       over the channels of each token; norm=False: h = x
    y = h W^T + bias + residual               gate: [a, g] = h W^T + bias,  y = a gelu(g) + residual

gelu(g) = g Phi(g), not its approximation by tanh. On CPUs it is C++: the sums of a and g never leave the cache. Weights
come packed (`pack_linear`), as the kernel reads them.

Sources: Ba 2016 (LayerNorm); Hendrycks & Gimpel 2016 (GELU); Shazeer 2020 (GEGLU).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import dispatch, library
from fastdiff.ops.norm_silu_conv import panels


class PackedLinear(NamedTuple):
    """The weights of a linear layer as the kernel reads them."""

    weight: Tensor
    """(panels, C, 32): panels of 32 outputs, zeros behind the last one's; with a gate those of a and g by turns."""
    outputs: int
    gate: bool


def pack_linear(weight: Tensor, *, gate: bool = False) -> PackedLinear:
    """Weights (O, C), with a gate (2 O, C), a's rows before g's, as the kernel reads them.

    Raises ValueError where they are no matrix, or no two halves.
    """
    if weight.ndim != 2 or not weight.shape[1] or (gate and weight.shape[0] % 2):
        accepted = "(2 O, C), C >= 1" if gate else "(O, C), C >= 1"
        raise ValueError(f"norm_linear: weight is {tuple(weight.shape)}; accepted: {accepted}, with gate={gate}")
    return PackedLinear(linear_panels(weight, gate).contiguous(), weight.shape[0] // (2 if gate else 1), gate)


def linear_panels(weight: Tensor, gate: bool) -> Tensor:
    """PackedLinear.weight, a view where it can be one, see `panels`."""
    if not gate:
        return panels(weight)
    return torch.stack([panels(half) for half in weight.chunk(2)], 1).flatten(0, 1)  # (2 panels, C, 32)


def unpack_linear(packed: PackedLinear) -> Tensor:
    """The weights (O, C), or (2 O, C), that were packed."""
    weight, outputs, gate = packed
    parts = [weight[i::2] for i in (0, 1)] if gate else [weight]
    return torch.cat([part.transpose(0, 1).flatten(1)[:, :outputs].t() for part in parts])


def norm_linear_ref(
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
    """The formula above in plain PyTorch."""
    matrix = unpack_linear(PackedLinear(weight, outputs, gate)).to(x.dtype)
    bias, norm_weight, norm_bias = (v if v is None else v.to(x.dtype) for v in (bias, norm_weight, norm_bias))
    h = functional.layer_norm(x, x.shape[2:], norm_weight, norm_bias, eps) if norm else x
    y = functional.linear(h, matrix, bias)
    if gate:
        a, g = y.chunk(2, 2)
        y = a * functional.gelu(g)
    return y if residual is None else y + residual.to(y.dtype)


def _fake(
    x: Tensor, weight: Tensor, outputs: int, gate: bool, bias: Tensor | None, norm: bool, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:2], outputs))


_TENSORS = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = dict(zip(_NAMES, inputs, strict=True))
    ctx.save_for_backward(*(given.pop(name) for name in _TENSORS))
    ctx.given = given


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """By the formula in torch ops, which can be differentiated again."""

    def formula(*tensors: Tensor | None) -> Tensor:
        given = {**ctx.given, **dict(zip(_TENSORS, tensors, strict=True))}
        first = [given.pop(name) for name in _NAMES[:5]]
        return norm_linear_ref(*first, **given)

    grads = dict(zip(_TENSORS, library.grads_of(formula, ctx.saved_tensors, dy), strict=True))
    return tuple(grads.get(name) for name in _NAMES)


def norm_linear(
    x: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gate: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """norm(x) W^T + bias + residual, or with gate=True a gelu(g) + residual of its halves; see the head of this file.

    x (N, L, C); weight (O, C), with a gate (2 O, C), a's rows before g's, or packed (`fastdiff.ops.pack_linear`, which
    is then told of the gate) once for many calls; bias (O,) or (2 O,); norm_weight, norm_bias (C,), with norm=True;
    residual (N, L, O). Returns (N, L, O). Twice differentiable in every tensor. Raises ValueError for shapes that do
    not fit. Ba 2016; Shazeer 2020.
    """
    packed = weight if isinstance(weight, PackedLinear) else pack_linear(weight, gate=gate)
    check(x, packed, gate, norm, {"norm_weight": norm_weight, "norm_bias": norm_bias}, bias)
    if residual is not None and residual.shape != (shape := (*x.shape[:2], packed.outputs)):
        raise ValueError(f"norm_linear: residual is {tuple(residual.shape)}; accepted: {shape}, as the result")
    given = {"norm": norm, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "residual": residual}
    return projected(x, packed, bias, **given)


def projected(x: Tensor, packed: PackedLinear, bias: Tensor | None, **given: Any) -> Tensor:
    """`norm_linear` without its checks."""
    # the registered op has no defaults
    y: Tensor = library.call("norm_linear", x, *packed, bias, **{**_DEFAULTS, **given})
    return y


def check(
    x: Tensor, packed: PackedLinear, gate: bool, norm: bool, affine: dict[str, Tensor | None], bias: Tensor | None
) -> None:
    """Raise ValueError for what no linear layer fits."""
    channels, rows = packed.weight.shape[1], packed.outputs * (2 if packed.gate else 1)
    if x.ndim != 3 or x.shape[2] != channels:
        raise ValueError(f"norm_linear: x is {tuple(x.shape)}; accepted: (N, L, {channels}), as the weight has inputs")
    if gate and not packed.gate:
        raise ValueError("norm_linear: gate=True with weights packed without; pass pack_linear(weight, gate=True)")
    if not norm and any(v is not None for v in affine.values()):
        raise ValueError("norm_linear: norm_weight and norm_bias go with norm=True")
    for name, v, count in (*((name, v, channels) for name, v in affine.items()), ("bias", bias, rows)):
        if v is not None and tuple(v.shape) != (count,):
            raise ValueError(f"norm_linear: {name} is {tuple(v.shape)}; accepted: ({count},)")


library.describe(
    "norm_linear",
    "(Tensor x, Tensor weight, int outputs, bool gate, Tensor? bias, bool norm, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? residual) -> Tensor",
    _fake,
    setup=_setup,
    backward=_backward,
)
_NAMES = ("x", "weight", "outputs", "gate", "bias", "norm", "norm_weight", "norm_bias", "eps", "residual")
_DEFAULTS: dict[str, Any] = norm_linear_ref.__kwdefaults__ or {}
dispatch.register("norm_linear", "reference", norm_linear_ref)
library.kernel("norm_linear", "cpp")
