"""q_sample: ours against eager and compiled references, and against what a training loop usually writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.case import Case
from fastdiff.ops import dispatch, philox
from fastdiff.ops.q_sample import q_sample_ref
from fastdiff.sampling.forward import marginals

SHAPES = ((128, 3, 32, 32), (64, 3, 32, 32), (128, 1, 28, 28))
LARGE = (1024, 4, 64, 64)  # 64 MB of fp32


def _by_hand(x0: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """Three lines of every training loop: randn_like, gather, multiply and add."""
    alpha, sigma = table[t].reshape(len(t), 2, 1, 1, 1).unbind(1)
    return alpha * x0 + sigma * torch.randn_like(x0)


def case(shape: tuple[int, ...], *, noise: bool, device: str, backend: str, compiled: bool) -> Case:
    """One shape, with given noise or with Philox noise that is also returned, as training needs it."""
    g = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    t = torch.randint(0, 1000, (shape[0],), generator=g).to(device)
    schedule = fd.cosine()
    table = marginals(schedule, torch.arange(1000).double().numpy()).to(device)
    given: dict[str, Any] = {"noise": z}
    if noise:
        given = {"seed": philox.seed_tensor(1, device), "index": torch.arange(shape[0], device=device), "eps": True}
    with fd.backend(backend):
        run = dispatch.choose("q_sample", x0, t, table, **{k: v for k, v in given.items() if k != "eps"})
    ours = f"ours ({backend})"
    variants: dict[str, Any] = {
        ours: lambda: run(x0, t, table, **given),
        "eager reference": lambda: q_sample_ref(x0, t, table, **given),
    }
    skipped: dict[str, str] = {}
    if compiled:
        part = torch.compile(q_sample_ref, fullgraph=True, dynamic=False)
        variants["compiled reference"] = lambda: part(x0, t, table, **given)
    if noise:
        variants["randn_like + mul + add"] = lambda: _by_hand(x0, t, table)
        if compiled:
            hand = torch.compile(_by_hand, fullgraph=True, dynamic=False)
            variants["randn_like + mul + add, compiled"] = lambda: hand(x0, t, table)
    try:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        draw = (lambda: torch.randn_like(x0)) if noise else (lambda: z)
        variants["diffusers add_noise"] = lambda: scheduler.add_noise(x0, draw(), t)
    except ImportError as error:
        skipped["diffusers add_noise"] = str(error)

    def check() -> float:
        got, wanted = run(x0, t, table, **given), q_sample_ref(x0, t, table, **given)
        worst = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
        assert worst <= 2e-6 * max(1.0, float(wanted[0].abs().max())), worst
        return worst

    kind = "noise in the kernel, eps returned" if noise else "given noise"
    title = f"q_sample {shape} fp32, {kind}"
    return Case(title, ours, variants, check, 3 * 4 * x0.numel(), skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for shape in SHAPES[:1] if quick else (*SHAPES, LARGE):
        for noise in (True, False):
            yield case(shape, noise=noise, device=device, backend=backend, compiled=not quick)
