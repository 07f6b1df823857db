"""The report of networks and loops on a GPU: rows by importance until the time is used, written after each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks import cold, probes
from benchmarks.budget import FULL, SMOKE, Budget, Cold, Row, kept, plan
from benchmarks.ceilings import Speed, matmul_rate
from benchmarks.nets import Nets, nets_of
from benchmarks.rows import OUT_OF_TIME, SECTIONS, DeviceLost, measure, said
from benchmarks.timing import copy_bandwidth

Save = Callable[[dict[str, Any]], None]


class Task(NamedTuple):
    """What is to be measured."""

    section: str
    device: str
    backends: Sequence[str]
    seconds: float | None = None
    """None: those of the version."""
    smoke: bool = False
    only: str = ""
    plan: Sequence[Row | Cold] | None = None
    """None: that of the section."""

    @property
    def items(self) -> list[Row | Cold]:
        """What was asked for, the most important first."""
        given = plan(self.section, smoke=self.smoke) if self.plan is None else self.plan
        return [item for item in given if self.only in item.title]

    @property
    def timing(self) -> float:
        """Seconds that a row is timed for."""
        return 5.0 if self.smoke else 10.0


@contextmanager
def fastest() -> Iterator[None]:
    """cuDNN tries its algorithms for each shape and keeps the fastest, for all variants."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def speed_of(device: str, name: str) -> Speed:
    """What this device can do at most."""
    cuda = device.startswith("cuda")
    return Speed(name, matmul_rate(device), copy_bandwidth(device, 256 if cuda else 16))


def report(task: Task, machine: dict[str, Any], save: Save) -> dict[str, Any]:
    """The record of a section; `save` gets it after each row, so that little is lost where the process is ended."""
    budget = Budget(task.seconds or (SMOKE if task.smoke else FULL))
    section, speed = SECTIONS[task.section], speed_of(task.device, machine["device"])
    record: dict[str, Any] = {
        "section": section.name, "what": section.what, "machine": machine, "smoke": task.smoke,
        "budget_seconds": budget.seconds, "copy_bytes_per_second": speed.copy, "matmul_flops": speed.matmul,
        "rows": [], "left_out": {}, "cold": {},
    }  # fmt: skip
    save(record)
    nets: Nets | None = None
    with fastest():
        for i, item in enumerate(task.items):
            if isinstance(item, Cold):
                record["cold"][item.title] = _cold(task, item, budget)
            elif not budget.fits("row", item.model.weight, task.timing):
                record["left_out"][item.title] = OUT_OF_TIME
            else:
                try:
                    nets = _networks(nets, item, task)
                    later = kept(task.items[i + 1 :], task.timing, budget.spent)
                    record["rows"].append(_row(task, item, nets, speed, budget, later))
                except DeviceLost as lost:
                    record["left_out"][item.title] = f"the device was lost: {lost}"
                    break
                except Exception as failed:
                    record["left_out"][item.title] = said(failed)
            save(record)
    record["seconds"] = budget.seconds - budget.left
    save(record)
    return record


def _networks(nets: Nets | None, row: Row, task: Task) -> Nets:
    """Those of the row before, where it had the same model."""
    if nets is not None and nets.model == row.model:
        return nets
    del nets
    probes.settle(task.device, every=True)
    return nets_of(row.model, task.device, quiet=SECTIONS[task.section].quiet)


def _row(task: Task, row: Row, nets: Nets, speed: Speed, budget: Budget, later: float) -> dict[str, Any]:
    """A row's record; "row" takes what nothing else in it does, so that one with other variants can be foreseen."""
    before, begin = len(budget.spent), time.monotonic()
    section, given = SECTIONS[task.section], {"speed": speed, "backends": task.backends, "budget": budget}
    try:
        made = measure(section, row, nets, timing=task.timing, later=later, **given)
    finally:
        # what one row compiled is of no use to the next, and the compiler counts
        torch.compiler.reset()
        probes.settle(task.device, every=True)
    made["seconds"] = time.monotonic() - begin
    rest = made["seconds"] - sum(spent.seconds for spent in budget.spent[before:])
    budget.note("row", row.model.weight, rest)
    return made


def _cold(task: Task, item: Cold, budget: Budget) -> dict[str, Any] | str:
    """Seconds to the first image, or why they are not known."""
    kind = "cold" if item.what == "ours" else f"cold {item.what}"
    if not budget.fits(kind, item.model.weight):
        return OUT_OF_TIME
    try:
        with budget.spending(kind, item.model.weight):
            return cold.measure(item.what, item.model.name, task.device, task.backends[0], budget.left)
    except RuntimeError as error:
        return str(error)
