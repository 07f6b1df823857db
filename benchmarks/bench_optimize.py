"""Live U-Nets of Stable Diffusion's kind on a CPU: `fd.optimize` against diffusers itself, eager and compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

import fastdiff as fd
from benchmarks.case import Case, later
from benchmarks.cpu import OPTIMIZED, Given, Made, awake, facts, held, torch_rivals
from benchmarks.models import SD15_CPU, SD_SMALL, SDXL_CPU, Model, Pair, Sample, live

SECONDS = 30.0
"""For timing one row."""


class Row(NamedTuple):
    """One comparison; modes of torch.compile: "default", "freezing"."""

    model: Model
    batch: int
    modes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Names it."""
        return f"U-Net {self.model.name} latent, batch {self.batch}, fp32"


# the compiler takes minutes for each batch; freezing copies the weights, for which there is no room twice
ROWS = (Row(SD15_CPU, 1, ("default", "freezing")), Row(SDXL_CPU, 1, ("default",)))
QUICK = (Row(SD_SMALL, 2, ()),)


def case(row: Row) -> Case:
    """Made when it is measured: the networks are large."""

    def make() -> Case:
        gc.collect()
        threads = torch.get_num_threads()
        theirs: Any = live(row.model).requires_grad_(False)
        # ours is the same object's other face
        given = Given.of(row.model, Pair(theirs, Sample(theirs), "diffusers"), row.batch)
        found = Made(given)
        if row.modes:
            awake()

        def optimized() -> partial[Any]:
            return partial(Sample(fd.optimize(theirs)), given.x, given.t, given.cond)

        for name, ready in {OPTIMIZED: optimized, **torch_rivals(given, row.modes)}.items():
            found.add(name, ready)
        run: Any = found.variants[OPTIMIZED]
        weights = {"network": held(theirs), "packed": held(run.func.net.fastdiff.net)}
        network = facts(found, threads, weights)
        return Case(
            row.title, OPTIMIZED, dict(found.variants), found.check, unit="ms", skipped=found.skipped,
            network=network, seconds=SECONDS,
        )  # fmt: skip

    return later(row.title, OPTIMIZED, make)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for row in QUICK if quick else ROWS:
        yield case(row)
