"""Standard normals of numbered images on GPUs: `fastdiff.ops.normal` as a Triton kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops import jit, native
from fastdiff.ops.philox_triton import blocks_of, counter_word, images_grid, normals, run_length, this_image


@triton.jit(do_not_specialize=["step_and_stream", "images"])
def normal_kernel(seed, index, z, step_and_stream, images, size, COUNT: tl.constexpr):
    """One block, COUNT numbers of one image."""
    n = this_image()
    if n >= images:
        return
    first = tl.program_id(0) * COUNT
    i = first + tl.arange(0, COUNT)
    block = blocks_of(first, COUNT, False)
    drawn = normals(tl.load(seed), block, step_and_stream, tl.load(index + n), [COUNT], False)
    tl.store(z + n.to(tl.int64) * size + i, drawn, mask=i < size)


def run(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """`normal` as a Triton kernel."""
    z = torch.empty((len(index), *shape), dtype=torch.float32, device=index.device)
    if z.numel():
        size = math.prod(shape)
        count = run_length(z.numel())
        grid = images_grid(triton.cdiv(size, count), len(index))
        seed, index = (native.dense(a, torch.int64) for a in (seed, index))
        jit.launch(normal_kernel, grid)(seed, index, z, counter_word(step, stream), len(index), size, COUNT=count)
    return z


def refuses(seed: Tensor, index: Tensor, step: int, stream: int, shape: Sequence[int]) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if math.prod(shape) >= 2**30:
        return f"one image must have fewer than 2^30 numbers, got {tuple(shape)}"
    return jit.refuses(seed, index)
