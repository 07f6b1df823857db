"""The whole DDIM loop: fd.Sampler against diffusers' DDIMScheduler loop around the same U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.bench_unet import CIFAR10, pair
from benchmarks.case import Case

STEPS = 50


def _nothing(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """A network that costs nothing: what is left is the loop."""
    return x


def _their_loop(den: fd.Denoiser, x: Tensor, cond: Tensor | None, eta: float, steps: int) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[den.schedule.name],
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[den.predicts],
        timestep_spacing="trailing",
        clip_sample=True,
    )
    scheduler.set_timesteps(steps)

    def run() -> Tensor:
        state = x
        with torch.no_grad():
            for t in scheduler.timesteps:
                F = den.net(state, t.expand(len(state)), cond)
                state = scheduler.step(F, t, state, eta=eta).prev_sample
        return state

    return run


def case(
    title: str, den: fd.Denoiser, shape: tuple[int, ...], eta: float, cond: Tensor | None = None, steps: int = STEPS
) -> Case:
    """One loop of `steps` DDIM steps around the same network from the same x_T."""
    fast = fd.Sampler(den, shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(den.device)

    def ours(eta: float = eta) -> Tensor:
        # diffusers takes the direction from the unclipped output
        return fast("ddim", steps=steps, x=x, cond=cond, eta=eta, clip=1.0, clipped_direction=False)

    variants: dict[str, Any] = {"ours": ours}
    skipped = {}
    try:
        variants["diffusers DDIMScheduler loop"] = _their_loop(den, x, cond, eta, steps)
    except ImportError as error:
        skipped["diffusers DDIMScheduler loop"] = str(error)

    def check() -> float | None:
        if skipped:
            return None
        # with noise the two draw different numbers: the deterministic loops are what can be compared
        worst = float((ours(0.0) - _their_loop(den, x, cond, 0.0, steps)()).abs().max())
        assert worst <= 1e-3, worst
        return worst

    title = f"DDIM-{steps} loop, {title}, {shape}, eta {eta:g}"
    return Case(title, "ours", variants, check, unit="ms", skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    nothing = fd.Denoiser(_nothing, fd.linear(), "eps")
    for shape in ((1, 3, 32, 32), (64, 3, 32, 32)):
        for eta in (0.0, 1.0):
            if device == "cpu":  # a function has no device of its own
                yield case("no network", nothing, shape, eta)
    digits = fd.load("digits")
    digits.net.to(device)
    for n in (1, 64):
        yield case("digits U-Net of 0.4 M", digits, (n, 1, 8, 8), 0.0, torch.arange(n, device=device) % 10)
    if quick:
        return
    net = pair(CIFAR10, device)[0]
    # random weights at full strength make the loop chaotic: no two roundings of it would agree
    torch.nn.init.normal_(net.out.weight, std=1e-3)
    yield case("DDPM CIFAR-10", fd.Denoiser(net, fd.linear(), "eps"), (4, 3, 32, 32), 0.0, steps=10)
