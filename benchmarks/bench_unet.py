"""One forward pass of the U-Net in fp32: ours against the rival's with the same weights, each at its best setting."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.models import DDPM, SMALL, Model, condition, pair
from fastdiff.nn import prepare


def case(model: Model, name: str, batch: int, *, device: str, compiled: bool) -> Case:
    """One network at one batch size."""
    ours, theirs, label, missing = pair(model, device)
    packed = prepare(ours)
    x = torch.randn(batch, 3, model.size, model.size, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.full((batch,), 500, device=device)
    labels = condition(model, batch)
    cond = None if labels is None else labels.to(device)
    last = x.contiguous(memory_format=torch.channels_last)
    theirs_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    variants: dict[str, Any] = {
        "ours": lambda: ours(x, t, cond),
        "ours, prepared": lambda: packed(last, t, cond),
        f"{label} eager": lambda: theirs(x, t, cond),
        f"{label} eager, channels_last": lambda: theirs_last(last, t, cond),
    }
    if compiled:
        options = {"freezing": True} if device == "cpu" else None
        fast = torch.compile(theirs, dynamic=False, options=options)
        variants[f"{label} torch.compile" + (", freezing" if options else "")] = lambda: fast(x, t, cond)

    def check() -> float:
        wanted = theirs(x, t, cond)
        worst = max(float((net(x, t, cond) - wanted).norm() / wanted.norm()) for net in (ours, packed))
        assert worst <= 1e-5, worst
        return worst

    skipped = {} if missing is None else {"diffusers": missing}
    title = f"U-Net {name}, batch {batch}, fp32"
    return Case(title, "ours", variants, check, unit="ms", skipped=skipped, also=("ours, prepared",))


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    if quick:
        yield case(SMALL, "small 32x32", 4, device=device, compiled=False)
        return
    for batch in (1, 4, 16):
        yield case(DDPM, "DDPM CIFAR-10", batch, device=device, compiled=True)
