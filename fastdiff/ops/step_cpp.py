"""The reverse step on CPUs: `fastdiff.ops.step_` by csrc/cpu/step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native, step_call


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
    """`step_` by csrc/cpu/step.cpp: one pass over the state, x_in and F read and written by stride."""
    if bad is not None and (bad.dtype != torch.int64 or not bad.is_contiguous()):
        raise ValueError(f"step_: bad must be dense int64, got {bad.dtype} with strides {bad.stride()}")
    call = step_call.addressed(x, x_in, h, F, rows, k, index, seed, variance=variance, noise=noise, bad=bad)
    native.cpu.step(*call.state, call.rows, len(rows), *call.key, *call.rest, torch.get_num_threads())


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
    return step_call.refuses("cpp", x, x_in, h) or native.refuses(x, x_in, h, F, *numbers, noise, bad)
