"""What the kernels of `step_` share on the host: which tensors they take, and how those are laid out for them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import native


def refuses(kernel: str, x: Tensor, x_in: Tensor | None, h: Tensor, bad: Tensor | None = None) -> str | None:
    """Why no kernel takes these tensors, None when all do; kernel is what the sentence calls it."""
    for name, a in (("x", x), ("h", h)):
        if a.dtype != torch.float32:
            return f"the state is float32 in the {kernel} kernel, got {name} in {a.dtype}"
    if x_in is not None and (x_in.dtype not in native.FLOATS or native.steps(x_in) is None):
        return (
            f"x_in must be float32, bfloat16 or float16, contiguous or channels_last, got {x_in.dtype} with strides "
            f"{x_in.stride()}"
        )
    if bad is not None and (bad.dtype != torch.int64 or not bad.is_contiguous()):
        return f"bad must be dense int64, got {bad.dtype} with strides {bad.stride()}"
    return None


def readable(F: Tensor) -> Tensor:
    """The network's output in a dtype and in steps that kernels follow: itself, or a copy."""
    F = F if F.dtype in native.FLOATS else F.float()
    return F if native.steps(F) is not None else F.contiguous()


class Addressed(NamedTuple):
    """A call as addresses and numbers, in the order in which the compiled kernels take each part."""

    state: tuple[int | bool, ...]  # x, h, x_in and whether it is doubled, F and whether it is guided
    rows: int
    key: tuple[int, ...]  # k, index, seed
    rest: tuple[int, ...]  # variance, noise, bad; images, channels, pixels
    held: tuple[Tensor | None, ...]  # copies, which must outlive the call


def addressed(
    x: Tensor,
    x_in: Tensor | None,
    h: Tensor,
    F: Tensor,
    rows: Tensor,
    k: Tensor,
    index: Tensor,
    seed: Tensor,
    *,
    variance: str | None,
    noise: Tensor | None,
    bad: Tensor | None,
) -> Addressed:
    """Addresses and sizes of a call; copies only what is not dense, or of another dtype."""
    n, channels, *space = x.shape
    rows = native.dense(rows, torch.float32)
    key = tuple(native.dense(a, torch.int64) for a in (k, index, seed))
    noise = None if noise is None else native.dense(noise, torch.float32)
    F = readable(F)
    network, following = native.strided(F), native.NOTHING if x_in is None else native.strided(x_in)
    assert network is not None
    assert following is not None
    return Addressed(
        state=(
            *(x.data_ptr(), h.data_ptr()),
            *(*following, x_in is not None and len(x_in) > n),
            *(*network, len(F) > n),
        ),
        rows=rows.data_ptr(),
        key=tuple(map(native.address, key)),
        rest=(
            (None, "range", "moment").index(variance),
            *map(native.address, (noise, bad)),
            *(n, channels, math.prod(space)),
        ),
        held=(F, rows, *key, noise),
    )
