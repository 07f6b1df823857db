"""Standard normals on a GPU: `fastdiff.ops.normal` by csrc/cuda/q_sample.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import cuda, native


def run(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """`philox.normal` in fp32."""
    z = torch.empty(len(index), *shape, device=index.device)
    seed, index = (native.dense(a, torch.int64) for a in (seed, index))
    cuda.kernels.normal(
        *map(native.address, (z, seed, index)),
        *(step, stream, len(index), math.prod(shape)),
        *cuda.queue(z),
    )
    return z


def refuses(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    return cuda.refuses(seed, index)
