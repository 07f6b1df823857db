"""The whole DDIM loop: fd.Sampler against diffusers' DDIMScheduler loop around the same U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.bench_unet import CIFAR10, SMALL, pair
from benchmarks.case import Case

STEPS = 50


def _nothing(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """A network that costs nothing: what is left is the loop."""
    return x


def _their_loop(net: Any, x: Tensor, eta: float, steps: int) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(steps)

    def run() -> Tensor:
        state = x
        with torch.no_grad():
            for t in scheduler.timesteps:
                state = scheduler.step(net(state, t.expand(len(state)), None), t, state, eta=eta).prev_sample
        return state

    return run


def case(
    title: str, net: Any, shape: tuple[int, ...], eta: float, device: str, backend: str, steps: int = STEPS
) -> Case:
    """One loop of `steps` DDIM steps from the same x_T."""
    den = fd.Denoiser(net, fd.linear(), "eps")
    fast = fd.Sampler(den, shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def ours() -> Tensor:
        # diffusers takes the direction from the unclipped output
        with fd.backend(backend):
            return fast("ddim", steps=steps, x=x, eta=eta, clip=1.0, clipped_direction=False)

    variants: dict[str, Any] = {"ours": ours}
    skipped = {}
    try:
        variants["diffusers DDIMScheduler loop"] = _their_loop(net, x, eta, steps)
    except ImportError as error:
        skipped["diffusers DDIMScheduler loop"] = str(error)

    def check() -> float:
        # with noise the two draw different numbers: the deterministic loop is what can be compared
        with fd.backend(backend):
            got = fast("ddim", steps=steps, x=x, clip=1.0, clipped_direction=False)
        if skipped:
            return 0.0
        worst = float((got - _their_loop(net, x, 0.0, steps)()).abs().max())
        assert worst <= 2e-4, worst
        return worst

    noise = f"eta {eta:g}"
    return Case(f"DDIM-{steps} loop, {title}, {shape}, {noise}", "ours", variants, check, unit="ms", skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for shape in ((1, 3, 32, 32), (64, 3, 32, 32)):
        for eta in (0.0, 1.0):
            yield case("no network", _nothing, shape, eta, device, backend)
    try:
        small, large = (pair(config, device)[0] for config in (SMALL, CIFAR10))
    except ImportError:
        return
    yield case("U-Net of 0.9 M", small, (4, 3, 32, 32), 0.0, device, backend)
    if not quick:
        yield case("DDPM CIFAR-10", large, (4, 3, 32, 32), 0.0, device, backend, steps=10)
