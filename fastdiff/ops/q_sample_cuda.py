"""The forward process on a GPU: `fastdiff.ops.q_sample` by csrc/cuda/q_sample.cu."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import cuda, native, philox, q_sample_call
from fastdiff.ops.q_sample import result_dtype


def run(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    where: Tensor | None = None,
    step: int = 0,
    stream: int = philox.Q_SAMPLE,
    eps: bool = False,
    v: bool = False,
    out: Tensor | None = None,
) -> list[Tensor]:
    """`q_sample` by csrc/cuda/q_sample.cu; results are contiguous. t outside the table is not noticed."""
    dtype = result_dtype(x0)
    new = [x0.new_empty(x0.shape, dtype=dtype) if asked else None for asked in (out is None, eps, v)]
    outs = [out if out is not None else new[0], *new[1:]]
    if x0.numel():
        call = q_sample_call.addressed(x0, t, table, noise, seed, index, where)
        cuda.kernels.q_sample(
            *(*call.images, *call.levels, *call.key, step, stream, *call.mask),
            *map(native.address, outs),
            *(call.dtype, *call.sizes, *cuda.queue(x0)),
        )
    return [a for a in outs if a is not None]


def refuses(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    where: Tensor | None = None,
    out: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if x0.dtype not in native.DTYPES:
        return f"the CUDA kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    if x0.ndim < 2:
        return f"the CUDA kernel takes images (N, C, *spatial), got {tuple(x0.shape)}"
    return cuda.refuses(x0, t, table, noise, seed, index, where, out)
