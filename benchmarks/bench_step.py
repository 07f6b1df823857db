"""step_: ours against eager and compiled references, and against what a diffusers loop does in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.case import Case
from fastdiff import row
from fastdiff.ops import dispatch, philox, step

SHAPES = ((64, 3, 32, 32), (1, 3, 32, 32), (1, 4, 64, 64), (16, 1, 28, 28))
LARGE = (1024, 4, 64, 64)  # 64 MB of fp32


def _arguments(shape: tuple[int, ...], eta: float, device: str) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    rows = torch.tensor(fd.plan(fd.linear(), "eps", fd.ddim, steps=50, eta=eta, clip=1.0)).float().to(device)
    x, F = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    h = torch.zeros(row.SLOTS, *shape, device=device)
    k, seed = torch.tensor([20], device=device), philox.seed_tensor(1, device)
    return x, torch.empty_like(x), h, F, rows, k, torch.arange(shape[0], device=device), seed


def _plain(x: Tensor, x_in: Tensor, F: Tensor, h: Tensor, rows: Tensor, z: Tensor | None) -> None:
    """The reference's formula in place, without history and the search for NaN, which this row does not need."""
    x.copy_(step.step_ref(x, F, h, rows[20], z)[0])
    x_in.copy_(rows[21, row.C_IN] * x)


def _with_torch_noise(x: Tensor, x_in: Tensor, F: Tensor, h: Tensor, rows: Tensor) -> None:
    """With torch's own generator: its noise depends on the batch and the device."""
    _plain(x, x_in, F, h, rows, torch.randn_like(x))


def _without_noise(x: Tensor, x_in: Tensor, F: Tensor, h: Tensor, rows: Tensor) -> None:
    _plain(x, x_in, F, h, rows, None)


def _diffusers(x: Tensor, F: Tensor, eta: float) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(50)
    t = int(scheduler.timesteps[20])
    return lambda: scheduler.step(F, t, x, eta=eta)


def case(shape: tuple[int, ...], *, noise: bool, device: str, backend: str, compiled: bool) -> Case:
    """One shape, with Philox noise in the kernel or without noise."""
    args = _arguments(shape, 1.0 if noise else 0.0, device)
    x, x_in, h, F, rows = args[:5]
    bad = torch.full((shape[0],), -1, device=device)
    with fd.backend(backend):
        run = dispatch.choose("step_", *args)
    start = x.clone()

    def eager() -> None:
        step.step_reference_(*args, bad=bad)

    def ours() -> None:
        run(*args, bad=bad)

    variants: dict[str, Any] = {f"ours ({backend})": ours, "eager reference": eager}
    skipped = {}
    formula = _with_torch_noise if noise else _without_noise
    name = "torch noise" if noise else "formula alone"
    variants[f"{name}, eager"] = lambda: formula(x, x_in, F, h, rows)
    if compiled:
        if noise:
            whole = torch.compile(step.step_reference_, fullgraph=True, dynamic=False)
            variants["compiled reference"] = lambda: whole(*args, bad=bad)
        part = torch.compile(formula, fullgraph=True, dynamic=False)
        variants[f"{name}, compiled"] = lambda: part(x, x_in, F, h, rows)
    try:
        variants["diffusers DDIMScheduler.step"] = _diffusers(x, F, 1.0 if noise else 0.0)
    except ImportError as error:
        skipped["diffusers DDIMScheduler.step"] = str(error)

    def check() -> float:
        worst = 0.0
        results = []
        for f in (eager, ours):
            x.copy_(start)
            f()
            results.append((x.clone(), x_in.clone()))
        for wanted, got in zip(*results, strict=True):
            worst = max(worst, float((got - wanted).abs().max()))
            assert worst <= 2e-6 * max(1.0, float(wanted.abs().max())), worst
        return worst

    kind = "noise in the kernel" if noise else "no noise"
    title = f"step_ {shape} fp32, {kind}"
    # x and F are read, x' and the next input are written
    return Case(title, f"ours ({backend})", variants, check, 4 * 4 * x.numel(), skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for shape in SHAPES[:2] if quick else (*SHAPES, LARGE):
        for noise in (True, False):
            yield case(shape, noise=noise, device=device, backend=backend, compiled=not quick)
