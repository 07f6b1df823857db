"""step_: ours against eager and compiled references, and against what a diffusers loop does in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.case import Case, each
from benchmarks.timing import buffers
from fastdiff import row
from fastdiff.ops import dispatch, philox, step

SHAPES = ((64, 3, 32, 32), (1, 3, 32, 32), (1, 4, 64, 64), (16, 1, 28, 28))
LARGE = (1024, 4, 64, 64)  # 64 MB of fp32


class Network(NamedTuple):
    """What the network takes and returns."""

    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + (
            ", channels_last" if self.layout is torch.channels_last else ""
        )


PLAIN, LAST = Network(), Network(torch.bfloat16, torch.channels_last)


def _arguments(shape: tuple[int, ...], eta: float, network: Network, device: str, seed: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.tensor(fd.plan(fd.linear(), "eps", fd.ddim, steps=50, eta=eta, clip=1.0)).float().to(device)
    x, F = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    F = F.to(network.dtype, memory_format=network.layout)
    h = torch.zeros(row.SLOTS, *shape, device=device)
    k, key = torch.tensor([20], device=device), philox.seed_tensor(1, device)
    return x, torch.empty_like(F), h, F, rows, k, torch.arange(shape[0], device=device), key


def _plain(x: Tensor, x_in: Tensor, h: Tensor, F: Tensor, rows: Tensor, z: Tensor | None) -> None:
    """The reference's formula in place, without history and the search for NaN, which this row does not need."""
    x.copy_(step.step_ref(x, F, h, rows[20], z)[0])
    x_in.copy_(rows[21, row.C_IN] * x)


def _with_torch_noise(x: Tensor, x_in: Tensor, h: Tensor, F: Tensor, rows: Tensor) -> None:
    """With torch's own generator: its noise depends on the batch and the device."""
    _plain(x, x_in, h, F, rows, torch.randn_like(x))


def _without_noise(x: Tensor, x_in: Tensor, h: Tensor, F: Tensor, rows: Tensor) -> None:
    _plain(x, x_in, h, F, rows, None)


def _diffusers(eta: float) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(50)
    t = int(scheduler.timesteps[20])
    return lambda x, x_in, h, F, rows: scheduler.step(F, t, x, eta=eta)


def _rivals(
    sets: list[tuple[Any, ...]], bad: Tensor, noise: bool, compiled: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    first = [s[:5] for s in sets]
    formula, name = (_with_torch_noise, "torch noise") if noise else (_without_noise, "formula alone")
    variants: dict[str, Any] = {
        "eager reference": each(step.step_reference_, sets, bad=bad),
        f"{name}, eager": each(formula, first),
    }
    if compiled:
        if noise:
            whole = torch.compile(step.step_reference_, fullgraph=True, dynamic=False)
            variants["compiled reference"] = each(whole, sets, bad=bad)
        variants[f"{name}, compiled"] = each(torch.compile(formula, fullgraph=True, dynamic=False), first)
    try:
        return variants | {"diffusers DDIMScheduler.step": each(_diffusers(1.0 if noise else 0.0), first)}, {}
    except ImportError as error:
        return variants, {"diffusers DDIMScheduler.step": str(error)}


def case(
    shape: tuple[int, ...], *, noise: bool, device: str, backend: str, compiled: bool, network: Network = PLAIN
) -> Case:
    """One shape, with Philox noise in the kernel or without noise."""
    # x and F are read, x' and the next input are written
    moved = (2 * 4 + 2 * network.dtype.itemsize) * torch.Size(shape).numel()
    eta = 1.0 if noise else 0.0
    sets = [_arguments(shape, eta, network, device, seed) for seed in range(buffers(device, moved))]
    bad = torch.full((shape[0],), -1, device=device)
    with fd.backend(backend):
        run = dispatch.choose("step_", *sets[0])
    ours = f"ours ({backend})"
    rivals, skipped = _rivals(sets, bad, noise, compiled)
    x, x_in = sets[0][:2]
    start = x.clone()

    def check() -> float:
        worst = 0.0
        results = []
        for f in (step.step_reference_, run):
            x.copy_(start)
            f(*sets[0], bad=bad)
            results.append((x.clone(), x_in.float()))
        for wanted, got in zip(*results, strict=True):
            worst = max(worst, float((got - wanted).abs().max()))
        # noise differs by 1e-6, which may take an input in bf16 to its neighbour
        bound = 2e-6 if network.dtype == torch.float32 else 2 * torch.finfo(network.dtype).eps
        assert worst <= bound * max(1.0, float(start.abs().max())), worst
        return worst

    title = f"step_ {shape} fp32, {'noise in the kernel' if noise else 'no noise'}"
    title += "" if network == PLAIN else f", network in {network}"
    return Case(title, ours, {ours: each(run, sets, bad=bad)} | rivals, check, moved, skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for shape in SHAPES[:2] if quick else (*SHAPES, LARGE):
        for noise in (True, False):
            yield case(shape, noise=noise, device=device, backend=backend, compiled=not quick)
    for shape in (SHAPES[0],) if quick else (SHAPES[0], LARGE):
        yield case(shape, noise=False, device=device, backend=backend, compiled=not quick, network=LAST)
