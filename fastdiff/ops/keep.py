"""to <- value, done by an op of its own where torch.compile traces it.

Inductor leaves a pointwise `value` unwritten until `to.copy_(value)` at the end of the graph. An op that changes in
place what `value` reads is told of that too late: it is in the list of kernels before `value` is, which then reads what
the op has written. What an op takes is written in front of it, and stays there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import jit


def _kept(to: Tensor, value: Tensor) -> None:
    to.copy_(value)


# torch.library.custom_op takes 7 ms of each import; of fake tensors copy_ knows what to make
_library: Any = torch.library.Library("fastdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("keep(Tensor(a!) to, Tensor value) -> ()")
_library.impl("keep", _kept, "CompositeExplicitAutograd")


def keep_(to: Tensor, value: Tensor) -> None:
    """Write value into `to`, of one shape, with what its operands hold now."""
    if jit.traced():
        torch.ops.fastdiff.keep(to, value)
    else:
        to.copy_(value)
