"""One forward pass of U-Nets in fp32 on a CPU: ours against everybody's engine with the same weights, each at its best.

Beside the whole batch sizes there are a row with one thread and one with AVX2 alone (`forced.py`); what the fast
convolutions do to the numbers, and what memory networks take, are notes behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import effect, forced, memory
from benchmarks.case import Case, later
from benchmarks.cpu import EXACT, PLAIN, PREPARED, Given, made
from benchmarks.engines import ENGINES
from benchmarks.models import ADM_SMALL, DDPM, FASHION, SMALL, Model, pair
from benchmarks.note import Note

SECONDS = 30.0
"""For timing one row."""


class Row(NamedTuple):
    """One comparison."""

    model: Model
    name: str
    batch: int
    modes: tuple[str, ...] = ("freezing",)
    """Of torch.compile: "default", "freezing"."""
    engines: tuple[str, ...] = tuple(ENGINES)
    threads: int | None = None
    """None: all."""

    @property
    def title(self) -> str:
        """Names it."""
        return f"U-Net {self.name}, batch {self.batch}, fp32" + ("" if self.threads is None else ", 1 thread")


# default mode is the slower one in every row that was measured, and costs a minute each to compile
BOTH = ("default", "freezing")
ROWS = (
    Row(DDPM, "DDPM CIFAR-10", 4, BOTH),
    *(Row(DDPM, "DDPM CIFAR-10", batch) for batch in (16, 1)),
    *(Row(ADM_SMALL, ADM_SMALL.name, batch) for batch in (1, 4)),
    *(Row(FASHION, FASHION.name, batch) for batch in (16, 64)),
    Row(DDPM, "DDPM CIFAR-10", 4, threads=1),
)
QUICK = (Row(SMALL, "small 32x32", 4, (), ()),)


def case(row: Row) -> Case:
    """Made when it is measured."""

    def make() -> Case:
        found, facts = made(Given.of(row.model, pair(row.model, "cpu"), row.batch), row.modes, row.engines)
        also = tuple(name for name in (PLAIN, EXACT) if name in found.variants)
        return Case(
            row.title, PREPARED, dict(found.variants), found.check, unit="ms", skipped=found.skipped, also=also,
            network=facts, seconds=SECONDS,
        )  # fmt: skip

    return later(row.title, PREPARED, make, threads=row.threads)


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    for row in QUICK if quick else ROWS:
        yield case(row)


def notes(quick: bool) -> Iterator[Note]:
    """What is measured once, behind the rows."""
    yield from effect.notes(quick)
    if not quick:
        yield from forced.notes()
        yield from memory.notes()
