"""The whole DDIM loop: fd.Sampler against diffusers' DDIMScheduler loop around the same U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.case import Case
from benchmarks.end_to_end import notes
from benchmarks.models import DDPM, pair
from fastdiff.sampling.run import Run

__all__ = ["cases", "notes"]
STEPS = 50


def _nothing(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """A network that costs nothing: what is left is the loop."""
    return x


def their_loop(den: fd.Denoiser, x: Tensor, cond: Tensor | None, eta: float, steps: int) -> Any:
    """diffusers' loop from x around den's network, as a function without arguments. Raises ImportError."""
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
    title: str,
    den: fd.Denoiser,
    shape: tuple[int, ...],
    eta: float,
    cond: Tensor | None = None,
    steps: int = STEPS,
    runs: Sequence[Run] = (fd.auto,),
) -> Case:
    """One loop of `steps` DDIM steps around the same network from the same x_T; ours by each of `runs`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(den.device)

    def by(run: Run) -> Callable[..., Tensor]:
        fast = fd.Sampler(den, shape, run=run)

        def loop(eta: float = eta) -> Tensor:
            # diffusers takes the direction from the unclipped output
            return fast("ddim", steps=steps, x=x, cond=cond, eta=eta, clip=1.0, clipped_direction=False)

        return loop

    ours = {"ours" if run == fd.auto else f"ours, {run!r}": by(run) for run in runs}
    variants: dict[str, Any] = {**ours}
    skipped = {}
    try:
        variants["diffusers DDIMScheduler loop"] = their_loop(den, x, cond, eta, steps)
    except ImportError as error:
        skipped["diffusers DDIMScheduler loop"] = str(error)

    def check() -> float | None:
        if skipped:
            return None
        # with noise the two draw different numbers: the deterministic loops are what can be compared
        wanted = their_loop(den, x, cond, 0.0, steps)()
        worst = max(float((loop(0.0) - wanted).abs().max()) for loop in ours.values())
        assert worst <= 1e-3, worst
        return worst

    title = f"DDIM-{steps} loop, {title}, {shape}, eta {eta:g}"
    return Case(title, "ours", variants, check, unit="ms", skipped=skipped, also=tuple(ours)[1:])


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    nothing = fd.Denoiser(_nothing, fd.linear(), "eps")
    for shape in ((1, 3, 32, 32), (64, 3, 32, 32)):
        for eta in (0.0, 1.0):
            if device == "cpu":  # a function has no device of its own
                yield case("no network", nothing, shape, eta)
    digits = fd.load("digits")
    digits.net.to(device)
    runs = (fd.auto,) if quick else (fd.auto, fd.compiled)
    for n in (1, 8 if quick else 64):
        yield case("digits U-Net of 0.4 M", digits, (n, 1, 8, 8), 0.0, torch.arange(n, device=device) % 10, runs=runs)
    if quick:
        return
    net = pair(DDPM, device, quiet=True).ours
    yield case("DDPM CIFAR-10", fd.Denoiser(net, fd.linear(), "eps"), (4, 3, 32, 32), 0.0, steps=10)
