"""What the kernels of `group_norm_silu` and `inject` share on the host: which tensors they take, and how laid out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.group_norm_silu import layout


class Given(NamedTuple):
    """The tensors of a call as the kernels take them: x and x2 dense in one layout, the small ones in fp32.

    `native.apart` says how far one image's numbers lie from the next one's in a small tensor.
    """

    x: Tensor
    x2: Tensor | None
    form: torch.memory_format
    """The layout of x, x2 and of the result."""
    weight: Tensor | None
    bias: Tensor | None
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, x: Tensor, x2: Tensor | None, *small: Tensor | None) -> Given:
        """Copies only what is not laid out as the result will be. small: weight, bias, add, scale, shift."""
        form = layout(x)
        x2 = None if x2 is None else x2.contiguous(memory_format=form)
        return cls(x.contiguous(memory_format=form), x2, form, *map(native.per_channel, small))

    @property
    def last(self) -> bool:
        """Whether the channels are."""
        return self.form is not torch.contiguous_format

    @property
    def small(self) -> tuple[Tensor | None, ...]:
        """weight, bias, add, scale, shift."""
        return self[3:]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Images, channels of x and x2 together, pixels; numbers where torch.compile traces with symbols."""
        n, channels, *space = self.x.shape
        return int(n), int(channels + (0 if self.x2 is None else self.x2.shape[1])), int(math.prod(space))

    def like(self, x: Tensor) -> Tensor:
        """x, the gradient of a result say, in the dtype and the layout of this x."""
        return x.to(self.x.dtype).contiguous(memory_format=self.form)

    def beside(self, v: Tensor | None) -> Tensor | None:
        """v, an image that is added to this x: in its layout and dtype, but in fp32 where it has another dtype."""
        if v is None:
            return None
        dtype = v.dtype if v.dtype is self.x.dtype else torch.float32
        return v.to(dtype).contiguous(memory_format=self.form)

    def empty(self, channels: int) -> Tensor:
        """A new tensor beside x of that many channels."""
        shape = (self.x.shape[0], channels, *self.x.shape[2:])
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.form)


def refuses(kernel: str, x: Tensor, x2: Tensor | None = None) -> str | None:
    """Why no kernel takes x and x2, None when all do; kernel is what the sentence calls it."""
    if x.dtype not in native.FLOATS:
        return f"the {kernel} kernel takes float32, bfloat16 and float16, got {x.dtype}"
    if x2 is not None and x2.dtype != x.dtype:
        return f"the {kernel} kernel takes x and x2 of one dtype, got {x.dtype} and {x2.dtype}"
    return None
