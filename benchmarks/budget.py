"""Which rows a report measures, by importance, and which of them still fit into its time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.models import ADM, DDPM, EDM, SD15, SDXL, SMALL, Model
from benchmarks.variants import MODES, OURS

FULL, SMOKE = 540.0, 300.0
"""Seconds of a report."""

BATCHES = (256, 1, 4, 16, 64, 512)

GUESS = {"row": 12.0, "plain": 2.5, "compile": 35.0, "max-autotune": 130.0, "cold": 40.0, "cold max-autotune": 200.0}
"""Seconds that a kind of work takes for DDPM-CIFAR10 where nothing has been measured yet."""

RESERVE = 5.0
"""Seconds kept for what comes behind the last row."""


class Row(NamedTuple):
    """One comparison of the report."""

    model: Model
    batch: int
    compiled: tuple[str, ...] = ()
    """Modes of torch.compile that are tried, of `MODES`, and `OURS`."""
    detail: bool = False
    """Whether kernels are counted, and what lies outside the network is measured."""
    ablation: bool = False
    """The tactics of `den.prepare`, in place of ours against rivals."""
    must: bool = False
    """Whether time is kept for it, and not used to compile for rows before it."""

    @property
    def title(self) -> str:
        """Names the row."""
        return f"{self.model.name}, batch {self.batch}" + (", tactics" if self.ablation else "")


class Spent(NamedTuple):
    """What some work has taken."""

    kind: str
    weight: float
    seconds: float


class Cold(NamedTuple):
    """The first image of a new process."""

    model: Model
    what: str
    """Of `cold.WHAT`."""

    @property
    def title(self) -> str:
        """Names it."""
        return f"{self.model.name}, cold start, {self.what}"


def plan(section: str, *, smoke: bool) -> list[Row | Cold]:
    """All that a section measures, the most important first."""
    return _smoke(section) if smoke else _full(section)


def _full(section: str) -> list[Row | Cold]:
    first, second, *rest = BATCHES
    every, some = (*MODES, OURS), (*tuple(MODES)[:2], OURS)
    loops = section == "sampler"
    made: list[Row | Cold] = [Row(DDPM, first, every, detail=True), Row(DDPM, second, some, detail=True)]
    made += [Row(DDPM, batch, must=True) for batch in rest]
    made += [Cold(DDPM, "ours"), Cold(DDPM, "max-autotune")] if loops else [Row(DDPM, first, ablation=True)]
    for model in (EDM, ADM):
        made += [Row(model, batch, some[:1], detail=True) for batch in (first, second)]
        made += [Row(model, batch) for batch in rest]
    # latents of 512 and of 1024 pixels, a text and no text
    return made if loops else made + [Row(model, 2, some[:1]) for model in (SD15, SDXL)]


def _smoke(section: str) -> list[Row | Cold]:
    """A little of everything: the batches between come last."""
    first, second, *rest = BATCHES
    quickest = tuple(MODES)[:1]
    made: list[Row | Cold] = [Row(DDPM, first, quickest, detail=True), Row(DDPM, second, quickest, detail=True)]
    made.append(Cold(DDPM, "ours") if section == "sampler" else Row(DDPM, first, ablation=True))
    made += [Row(model, batch) for model in (EDM, ADM) for batch in (64, second)]
    return made + [Row(DDPM, batch) for batch in rest]


QUICK: list[Row | Cold] = [Row(SMALL, 4, detail=True), Row(SMALL, 1)]
"""To see whether the report works."""


def expected(kind: str, weight: float, spent: Sequence[Spent]) -> float:
    """Seconds that work of a kind will take for a model of this weight.

    What it took the last time for such a model; else for the last other one, by weight; else a guess.
    """
    last = [s for s in spent if s.kind == kind]
    same = [s.seconds for s in last if s.weight == weight]
    if same:
        return same[-1]
    return weight * (last[-1].seconds / last[-1].weight if last else GUESS[kind])


def kept(items: Sequence[Row | Cold], timing: float, spent: Sequence[Spent]) -> float:
    """Seconds that the rows which must be measured will take, with nothing compiled."""
    plain = 8  # variants, about
    return sum(
        expected("row", row.model.weight, spent) + plain * expected("plain", row.model.weight, spent) + timing
        for row in items
        if isinstance(row, Row) and row.must
    )


class Budget:
    """The time of a report: `left`, and what its parts have taken."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._now, self._begin = seconds, now, now()
        self.spent: list[Spent] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (self._now() - self._begin)

    def fits(self, kind: str, weight: float, also: float = 0.0) -> bool:
        """Whether work of a kind, and `also` seconds behind it, can be expected to end in time."""
        return expected(kind, weight, self.spent) + also + RESERVE <= self.left

    @contextlib.contextmanager
    def spending(self, kind: str, weight: float) -> Iterator[None]:
        """Remember what the work inside takes, unless it fails."""
        begin = self._now()
        yield
        self.note(kind, weight, self._now() - begin)

    def note(self, kind: str, weight: float, seconds: float) -> None:
        """Remember what some work has taken."""
        self.spent.append(Spent(kind, weight, seconds))
