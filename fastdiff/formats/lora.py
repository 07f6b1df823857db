"""Low-rank adapters (LoRA, Hu 2021) as peft hangs them into a module: read as the weight that they make.

W = base + sum of scaling B A over the active adapters; base alone where they are merged into it or disabled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Made(NamedTuple):
    """A weight, and how it is made."""

    sources: tuple[str, ...]
    """Names of parameters."""
    make: Callable[..., Tensor]


class NotRead(Exception):
    """Why a module cannot be read, in one sentence's words."""


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of peft's, of any kind."""
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)


def state(layer: Any) -> tuple[Any, ...]:
    """What decides which adapters act, and how much."""
    return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), dict(layer.scaling)


def read(name: str, layer: Any, scale: float = 1.0) -> dict[str, Made]:
    """Weight and bias of an adapted layer, by the names that they have without adapters. Raises NotRead.

    scale: of all adapters, beside their own.
    """
    if not any(kind.__name__ == "LoraLayer" for kind in type(layer).__mro__):
        raise NotRead(f"{name} has an adapter of kind {type(layer).__name__}, which is no LoRA")
    base = layer.get_base_layer()
    active, disabled, merged, scaling = state(layer)
    acting = [a for a in active if a in layer.lora_A] if not (disabled or merged) else []
    for a in acting:
        if layer.use_dora.get(a) or layer.lora_variant.get(a) or layer.lora_bias.get(a):
            raise NotRead(f"{name} has an adapter {a!r} that is more than LoRA (DoRA, a bias ...)")
    if type(base) not in (nn.Linear, nn.Conv2d) or getattr(layer, "fan_in_fan_out", False):
        raise NotRead(f"{name} has LoRA on a {type(base).__name__}")
    pairs = [f"{name}.lora_{side}.{a}.weight" for a in acting for side in "AB"]
    scales = [scale * scaling[a] for a in acting]

    def weight(w: Tensor, *parts: Tensor) -> Tensor:
        for A, B, s in zip(parts[::2], parts[1::2], scales, strict=True):
            w = w + s * torch.einsum("or,r...->o...", B.flatten(1), A)
        return w

    made = {f"{name}.weight": Made((f"{name}.base_layer.weight", *pairs), weight)}
    if base.bias is not None:
        made[f"{name}.bias"] = Made((f"{name}.base_layer.bias",), itself)
    return made


def itself(w: Tensor) -> Tensor:
    """w."""
    return w
