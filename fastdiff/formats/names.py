"""How one of our parameters is put together from tensors of somebody else's network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """Names of tensors, one below the other."""

    names: list[str]
    heads: int = 0
    """Of a qkv whose rows are ordered by head first, and then q, k, v; 0: they are not."""


def fits(part: Tensor, shape: tuple[int, ...], parts: int) -> bool:
    """Whether `part` is one of as many parts of a parameter of this shape; a window of one pixel is a matrix."""
    tail = tuple(part.shape[1:])
    same = tail == shape[1:] or (len(shape) == 2 and tail[:1] == shape[1:] and set(tail[1:]) == {1})
    return part.shape[0] * parts == shape[0] and same


def join(parts: list[Tensor], shape: tuple[int, ...], heads: int = 0) -> Tensor:
    """Our parameter of this shape from its parts."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if heads:
        whole = whole.reshape(heads, 3, -1, *whole.shape[1:]).transpose(0, 1)
    return whole if whole.shape == shape else whole.reshape(shape)
