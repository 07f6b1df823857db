"""q_sample: ours against eager and compiled references, and against what a training loop usually writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.case import Case, each
from benchmarks.timing import buffers
from fastdiff.ops import dispatch, philox
from fastdiff.ops.q_sample import q_sample_ref
from fastdiff.sampling.forward import marginals

SHAPES = ((128, 3, 32, 32), (64, 3, 32, 32), (128, 1, 28, 28))
LARGE = (1024, 4, 64, 64)  # 64 MB of fp32


def _by_hand(x0: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """Three lines of every training loop: randn_like, gather, multiply and add."""
    alpha, sigma = table[t].reshape(len(t), 2, 1, 1, 1).unbind(1)
    return alpha * x0 + sigma * torch.randn_like(x0)


def _reference(x0: Tensor, t: Tensor, table: Tensor, given: dict[str, Any]) -> list[Tensor]:
    return q_sample_ref(x0, t, table, **given)


def _scheduler() -> Any:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def add_noise(x0: Tensor, t: Tensor, table: Tensor, given: dict[str, Any]) -> Tensor:
        noise = given["noise"] if "noise" in given else torch.randn_like(x0)
        result: Tensor = scheduler.add_noise(x0, noise, t)
        return result

    return add_noise


def _arguments(shape: tuple[int, ...], noise: bool, into: bool, device: str, seed: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    x0, z = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    t = torch.randint(0, 1000, (shape[0],), generator=g).to(device)
    table = marginals(fd.cosine(), torch.arange(1000).double().numpy()).to(device)
    given: dict[str, Any] = {"noise": z}
    if noise:
        given = {"seed": philox.seed_tensor(1, device), "index": torch.arange(shape[0], device=device), "eps": True}
    return x0, t, table, given | ({"out": torch.zeros_like(x0)} if into else {})


def case(shape: tuple[int, ...], *, noise: bool, device: str, backend: str, compiled: bool, into: bool = False) -> Case:
    """One shape, with given noise or with Philox noise that is also returned, as training needs it; into: x_t is
    written into memory that is there already."""
    moved = 3 * 4 * torch.Size(shape).numel()
    sets = [_arguments(shape, noise, into, device, seed) for seed in range(buffers(device, moved))]
    x0, t, table, given = sets[0]
    with fd.backend(backend):
        run = dispatch.choose("q_sample", x0, t, table, **given)
    ours = f"ours ({backend})"

    def kernel(x0: Tensor, t: Tensor, table: Tensor, given: dict[str, Any]) -> list[Tensor]:
        results: list[Tensor] = run(x0, t, table, **given)
        return results

    variants: dict[str, Any] = {ours: each(kernel, sets), "eager reference": each(_reference, sets)}
    skipped: dict[str, str] = {}
    if compiled:
        variants["compiled reference"] = each(torch.compile(_reference, fullgraph=True, dynamic=False), sets)
    if noise:
        plain = [s[:3] for s in sets]
        variants["randn_like + mul + add"] = each(_by_hand, plain)
        if compiled:
            hand = torch.compile(_by_hand, fullgraph=True, dynamic=False)
            variants["randn_like + mul + add, compiled"] = each(hand, plain)
    try:
        variants["diffusers add_noise"] = each(_scheduler(), sets)
    except ImportError as error:
        skipped["diffusers add_noise"] = str(error)

    def check() -> float:
        got = [a.clone() for a in kernel(*sets[0])]
        wanted = _reference(*sets[0])
        worst = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
        assert worst <= 2e-6 * max(1.0, float(wanted[0].abs().max())), worst
        return worst

    kind = "noise in the kernel, eps returned" if noise else "given noise"
    title = f"q_sample {shape} fp32, {kind}" + (", into a given tensor" if into else "")
    return Case(title, ours, variants, check, moved, skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for shape in SHAPES[:1] if quick else (*SHAPES, LARGE):
        for noise in (True, False):
            yield case(shape, noise=noise, device=device, backend=backend, compiled=not quick)
    yield case(SHAPES[0] if quick else LARGE, noise=False, into=True, device=device, backend=backend,
               compiled=not quick)  # fmt: skip
