"""to <- value, done by an op of its own where torch.compile traces it.

Inductor leaves a pointwise `value` unwritten until `to.copy_(value)` at the end of the graph. An op that changes in
place what `value` reads is told of that too late: it is in the list of kernels before `value` is, which then reads what
the op has written. What an op takes is written in front of it, and stays there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import jit


@torch.library.custom_op("fastdiff::keep", mutates_args=("to",))
def _kept(to: Tensor, value: Tensor) -> None:
    to.copy_(value)


@_kept.register_fake
def _fake(to: Tensor, value: Tensor) -> None:
    """It returns nothing."""


def keep_(to: Tensor, value: Tensor) -> None:
    """Write value into `to`, of one shape, with what its operands hold now."""
    if jit.traced():
        _kept(to, value)
    else:
        to.copy_(value)
