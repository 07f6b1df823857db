"""The reverse step on a GPU: `fastdiff.ops.step_` by csrc/cuda/step.cu."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import cuda, step_call


def run(
    x: Tensor,
    x_in: Tensor | None,
    h: Tensor,
    F: Tensor,
    rows: Tensor,
    k: Tensor,
    index: Tensor,
    seed: Tensor,
    *,
    variance: str | None = None,
    noise: Tensor | None = None,
    bad: Tensor | None = None,
) -> None:
    """`step_` by csrc/cuda/step.cu: row, counter, seed and numbers of the images are read on the device.

    k outside the rows and a SLOT that is none are not noticed.
    """
    if x.numel() == 0:
        return
    call = step_call.addressed(x, x_in, h, F, rows, k, index, seed, variance=variance, noise=noise, bad=bad)
    cuda.kernels.step(*call.state, call.rows, *call.key, *call.rest, *cuda.queue(x))


def refuses(
    x: Tensor,
    x_in: Tensor | None,
    h: Tensor,
    F: Tensor,
    *numbers: Tensor,
    variance: str | None = None,
    noise: Tensor | None = None,
    bad: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    return step_call.refuses("CUDA", x, x_in, h, bad) or cuda.refuses(x, x_in, h, F, *numbers, noise, bad)
