"""Noise from torch's generators, drawn as diffusers draws it, so that its seeds reproduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(like: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> Tensor:
    """torch.randn of the shape and on the device of `like`; dtype: its own unless given.

    A generator of the CPU draws on the CPU for any device. A list has one for each image. Raises ValueError for a list
    of another length, and for a GPU's generator where the images are on another device.
    """
    dtype = dtype or like.dtype
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    one = generator[0] if isinstance(generator, Sequence) else generator
    device = like.device if one is None else one.device
    if device.type not in ("cpu", like.device.type):
        raise ValueError(
            f"generator is on {device} and the images on {like.device}; pass a generator of the CPU or of {like.device}"
        )
    where = torch.device("cpu") if device.type == "cpu" else like.device
    if not isinstance(generator, Sequence):
        return torch.randn(like.shape, generator=generator, device=where, dtype=dtype).to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"generator: {len(generator)} generators for {len(like)} images; pass one, or one for each")
    each = [torch.randn((1, *like.shape[1:]), generator=g, device=where, dtype=dtype) for g in generator]
    return torch.cat(each).to(like.device)
