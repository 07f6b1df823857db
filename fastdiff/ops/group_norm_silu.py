"""GroupNorm, the injection of the time embedding, and SiLU, in one op.

    z = cat([x, x2], 1) + add                                     add: the embedding in front of the norm
    n = (z - mean_g(z)) / sqrt(var_g(z) + eps) * weight + bias    mean and variance over (C / groups, *spatial)
    y = silu(n (1 + scale) + shift)                               scale, shift: the embedding behind the norm

Sources: Wu & He 2018 (GroupNorm); Ho 2020 (`add`); Nichol & Dhariwal 2021 (`scale`, `shift`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import dispatch


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
    y = functional.group_norm(y, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _per_channel(scale.to(wide), y))
    if shift is not None:
        y = y + _per_channel(shift.to(wide), y)
    return (functional.silu(y) if act else y).to(x.dtype)


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
    Raises ValueError when the channels do not divide into `groups`. Wu & He 2018; Nichol & Dhariwal 2021, section 4.
    """
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    if groups < 1 or channels % groups:
        raise ValueError(
            f"group_norm_silu: groups={groups} does not divide the {channels} channels of x; pass a divisor"
        )
    run = dispatch.choose("group_norm_silu", x, groups, weight, bias, x2=x2, add=add, scale=scale, shift=shift)
    y: Tensor = run(x, groups, weight, bias, eps=eps, x2=x2, add=add, scale=scale, shift=shift, act=act)
    return y


dispatch.register("group_norm_silu", "reference", group_norm_silu_ref)
