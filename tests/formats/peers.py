"""diffusers' schedulers as peers: in float64, over a network of their own and ours, with the same noise."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

MODULES = {
    "DDPM": "ddpm",
    "DDIM": "ddim",
    "EulerDiscrete": "euler_discrete",
    "EulerAncestralDiscrete": "euler_ancestral_discrete",
    "HeunDiscrete": "heun_discrete",
    "DPMSolverMultistep": "dpmsolver_multistep",
    "PNDM": "pndm",
}
"""Classes that are followed, and the files that they are in."""
SHAPE = (2, 3, 4, 4)


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def wide(name: str) -> Iterator[None]:
    """diffusers' class computes in float64 throughout: it casts to float32 by name, and that name says float64 here."""
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    torch.set_default_dtype(torch.float64)
    module.torch, module.np = _Wide(torch), _Wide(np)
    try:
        yield
    finally:
        module.torch, module.np = torch, np
        torch.set_default_dtype(torch.float32)


def peer_of(name: str, config: dict[str, Any]) -> Any:
    """diffusers' scheduler; it warns of names that it will drop."""
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, f"{name}Scheduler")(**config)


def net(x: torch.Tensor, t: float) -> torch.Tensor:
    """A network that mixes its pixels and knows the time, smooth enough that a loop does not magnify rounding."""
    return torch.sin(0.5 * x + 0.01 * t) + 0.1 * torch.tanh(x.flip(-1))


def loop(
    scheduler: Any,
    x: torch.Tensor,
    told: list[float],
    *,
    network: Any = net,
    states: list[torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """The loop of a pipeline: `told` is what the network hears, the scheduler its own timesteps."""
    x = x * scheduler.init_noise_sigma
    for t, heard in zip(scheduler.timesteps, told, strict=True):
        F = network(scheduler.scale_model_input(x, t), heard)
        x = scheduler.step(F, t, x, **options).prev_sample
        if states is not None:
            states.append(x)
    return x


def start(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The first noise."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=dtype)
