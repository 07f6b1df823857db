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


def _with_torch_noise(x: Tensor, F: Tensor, h: Tensor, r: Tensor) -> Tensor:
    """The reference's formula with torch's own generator: less work than ours, noise that depends on the batch."""
    return step.step_ref(x, F, h, r, torch.randn_like(x))[0]


def _without_noise(x: Tensor, F: Tensor, h: Tensor, r: Tensor) -> Tensor:
    return step.step_ref(x, F, h, r, None)[0]


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
    with fd.backend(backend):
        run = dispatch.choose("step_", x, x_in, h, F, rows, None)
    r = rows[20]
    start = x.clone()

    def eager() -> None:
        step.step_reference_(*args)

    variants: dict[str, Any] = {f"ours ({backend})": lambda: run(*args), "eager reference": eager}
    skipped, extras = {}, ["torch noise, eager"] if noise else []
    if compiled:
        whole = torch.compile(step.step_reference_, fullgraph=True, dynamic=False)
        part = torch.compile(_with_torch_noise if noise else _without_noise, fullgraph=True, dynamic=False)
        if noise:
            variants["compiled reference"] = lambda: whole(*args)
            variants["torch noise, compiled"] = lambda: part(x, F, h, r)
            extras.append("torch noise, compiled")
        else:
            variants["compiled reference"] = lambda: part(x, F, h, r)
    if noise:
        variants["torch noise, eager"] = lambda: _with_torch_noise(x, F, h, r)
    try:
        variants["diffusers DDIMScheduler.step"] = _diffusers(x, F, 1.0 if noise else 0.0)
        extras.append("diffusers DDIMScheduler.step")
    except ImportError as error:
        skipped["diffusers DDIMScheduler.step"] = str(error)

    def check() -> float:
        x.copy_(start)
        eager()
        wanted = x.clone()
        x.copy_(start)
        run(*args)
        worst = float((x - wanted).abs().max())
        assert worst <= 2e-6 * max(1.0, float(wanted.abs().max())), worst
        return worst

    kind = "noise in the kernel" if noise else "no noise"
    # x and F are read, x' and the next input are written
    return Case(
        f"step_ {shape} fp32, {kind}",
        f"ours ({backend})",
        variants,
        check,
        4 * 4 * x.numel(),
        skipped=skipped,
        extras=tuple(extras),
    )


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for shape in SHAPES[:2] if quick else (*SHAPES, LARGE):
        for noise in (True, False):
            yield case(shape, noise=noise, device=device, backend=backend, compiled=not quick)
