"""One forward pass of the larger U-Nets in fp32, as bench_unet has it of DDPM's: seconds a call on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench_unet import Row, case
from benchmarks.case import Case
from benchmarks.models import ADM, EDM


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for model in (EDM, ADM):
        yield case(Row(model, model.name, 1))
