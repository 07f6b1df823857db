"""What the compiled kernels of `q_sample` share on the host: how a call's tensors are laid out for them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.q_sample import result_dtype


class Addressed(NamedTuple):
    """A call as addresses and numbers, in the order in which the compiled kernels take each part."""

    images: tuple[int, ...]  # x0, given noise, each with its dtype
    levels: tuple[int, int]  # t, table
    key: tuple[int, int]  # seed, index
    mask: tuple[int, ...]  # its bytes and the steps between images, channels and pixels
    sizes: tuple[int, int, int]  # images, channels, pixels
    dtype: int  # of the results
    held: tuple[Tensor | None, ...]  # copies, which must outlive the call


def addressed(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    index: Tensor | None,
    where: Tensor | None,
) -> Addressed:
    """Addresses and sizes of a call; copies only what is not dense, or of another dtype."""
    x0, t, table = x0.contiguous(), native.dense(t, torch.int64), native.dense(table, torch.float32)
    seed, index = (None if a is None else native.dense(a, torch.int64) for a in (seed, index))
    if noise is not None:
        noise = native.dense(noise, noise.dtype if noise.dtype in native.FLOATS else torch.float32)
    mask = None if where is None else _mask(where, x0.shape)
    return Addressed(
        images=(
            *(x0.data_ptr(), native.DTYPES[x0.dtype]),
            *(native.address(noise), 0 if noise is None else native.DTYPES[noise.dtype]),
        ),
        levels=(t.data_ptr(), table.data_ptr()),
        key=(native.address(seed), native.address(index)),
        mask=(native.address(mask), *((0, 0, 0) if mask is None else native.steps(mask) or ())),
        sizes=(len(x0), math.prod(x0.shape[1:2]), math.prod(x0.shape[2:])),
        dtype=native.DTYPES[result_dtype(x0)],
        held=(x0, t, table, noise, seed, index, mask),
    )


def _mask(where: Tensor, shape: torch.Size) -> Tensor:
    """The mask's bytes, expanded to `shape` in strides that the kernels can follow."""
    mask = where.view(torch.uint8)
    if native.steps(mask.expand(shape)) is None:
        # broadcast along some of the spatial axes only, or transposed
        mask = mask.expand(*where.shape[:2], *shape[2:]).clone(memory_format=torch.contiguous_format)
    return mask.expand(shape)
