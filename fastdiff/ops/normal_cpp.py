"""Standard normals on CPUs: `fastdiff.ops.normal` by csrc/cpu/q_sample.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import native


def run(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """`philox.normal` in fp32."""
    z = native.fresh((len(index), *shape), torch.float32)
    seed, index = (native.dense(a, torch.int64) for a in (seed, index))
    native.cpu.normal(
        *(z.data_ptr(), seed.data_ptr(), index.data_ptr(), step, stream),
        *(len(index), math.prod(shape), torch.get_num_threads()),
    )
    return z


def refuses(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    return native.refuses(seed, index)
