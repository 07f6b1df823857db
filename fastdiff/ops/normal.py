"""Standard normals of numbered images, the noise that a run starts from: `philox.normal` as an op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import dispatch, native, philox


def normal_cpp(
    seed: Tensor,
    index: Tensor,
    step: int,
    stream: int,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`philox.normal` by csrc/cpu/q_sample.cpp."""
    z = torch.empty(len(index), *shape)
    seed, index = (native.dense(a, torch.int64) for a in (seed, index))
    native.cpu.normal(
        *(z.data_ptr(), seed.data_ptr(), index.data_ptr(), step, stream),
        *(len(index), math.prod(shape), torch.get_num_threads()),
    )
    return z


def _cpp_refuses(
    seed: Tensor, index: Tensor, step: int, stream: int, shape: object, dtype: torch.dtype = torch.float32
) -> str | None:
    if dtype != torch.float32:
        return f"the cpp kernel draws float32, not {dtype}"
    return native.refuses(seed, index)


def normal(
    seed: Tensor,
    index: Tensor,
    step: int,
    stream: int,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals z (N, *shape) of the images `index` (N,) int64; layout and formula in `fastdiff.ops.philox`.

    seed (1,) int64; step a row's number (< 2^24); stream 0..255, 128 and above being the user's.
    """
    if seed.shape != (1,) or index.ndim != 1:
        raise ValueError(f"normal: seed must be (1,) and index (N,), got {tuple(seed.shape)} and {tuple(index.shape)}")
    run = dispatch.choose("normal", seed, index, step, stream, shape, dtype)
    z: Tensor = run(seed, index, step, stream, shape, dtype)
    return z


dispatch.register("normal", "reference", philox.normal)
dispatch.register("normal", "cpp", normal_cpp, missing=native.missing, refuses=_cpp_refuses)
