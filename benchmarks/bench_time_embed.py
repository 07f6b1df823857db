"""time_embed: ours against eager and compiled references, and against diffusers' function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastdiff as fd
from benchmarks.case import Case
from fastdiff.ops import dispatch
from fastdiff.ops.time_embed import time_embed_ref

SHAPES = ((64, 128), (1, 320), (16, 320), (256, 128))


def case(n: int, dim: int, *, device: str, backend: str, compiled: bool) -> Case:
    """The features of n steps of a thousand."""
    t = torch.linspace(0, 999, n).long().to(device)
    with fd.backend(backend):
        run = dispatch.choose("time_embed", t, dim)
    ours = f"ours ({backend})"
    variants: dict[str, Any] = {ours: lambda: run(t, dim), "eager reference": lambda: time_embed_ref(t, dim)}
    skipped: dict[str, str] = {}
    if compiled:
        part = torch.compile(time_embed_ref, fullgraph=True, dynamic=False)
        variants["compiled reference"] = lambda: part(t, dim)
    try:
        from diffusers.models.embeddings import get_timestep_embedding

        variants["diffusers get_timestep_embedding"] = lambda: get_timestep_embedding(t, dim, downscale_freq_shift=0)
    except ImportError as error:
        skipped["diffusers get_timestep_embedding"] = str(error)

    def check() -> float:
        exact, reference, got = time_embed_ref(t.double(), dim), time_embed_ref(t, dim), run(t, dim)
        # fp32 angles of 999 are off by 3e-5 themselves
        assert (got - exact).abs().max() <= 2 * (reference - exact).abs().max() + 1e-7
        return float((got - reference).abs().max())

    return Case(f"time_embed ({n},) to ({n}, {dim}) fp32", ours, variants, check, 4 * n * dim, skipped=skipped)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for n, dim in SHAPES[:1] if quick else SHAPES:
        yield case(n, dim, device=device, backend=backend, compiled=not quick)
