"""Standard normals of numbered images, the noise that a run starts from: `philox.normal` as an op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import cuda, dispatch, jit, library, philox


def _fake(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    return index.new_empty((len(index), *shape), dtype=torch.float32)


def normal(
    seed: Tensor,
    index: Tensor,
    step: int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals z (N, *shape) of the images `index` (N,) int64; layout and formula in `fastdiff.ops.philox`.

    seed (1,) int64; step a row's number (< 2^24); stream 0..255, 128 and above being the user's. dtype: fp32, or
    float64 for the reference alone.
    """
    if seed.shape != (1,) or index.ndim != 1:
        raise ValueError(f"normal: seed must be (1,) and index (N,), got {tuple(seed.shape)} and {tuple(index.shape)}")
    if dtype != torch.float32:
        if dispatch.asked() not in ("auto", "reference"):
            raise dispatch.BackendUnavailable(f"normal on {dispatch.asked()}: kernels draw float32, not {dtype}")
        return philox.normal(seed, index, step, stream, shape, dtype)
    z: Tensor = library.call("normal", seed, index, step, stream, shape)
    return z


library.describe("normal", "(Tensor seed, Tensor index, int step, int stream, SymInt[] shape) -> Tensor", _fake)
dispatch.register("normal", "reference", philox.normal)
library.kernel("normal", "cpp")
library.kernel("normal", "triton", by_name=jit.UNPROVEN)
library.kernel("normal", "cuda", by_name=cuda.COMPILED_ONLY)
