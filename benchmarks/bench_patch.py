"""diffusers' network as it is and after `fd.patch`, the same weights: what one line buys in somebody else's program."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

import fastdiff as fd
from benchmarks.case import Case
from benchmarks.models import DDPM, SMALL


def case(name: str, config: dict[str, Any] | None, batch: int, *, device: str, last: bool, compiled: bool) -> Case:
    """One network at one batch size and layout."""
    from diffusers import UNet2DModel

    assert config is not None
    form = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    plain = UNet2DModel(**config).eval().to(device, memory_format=form)
    patched = copy.deepcopy(plain)
    fd.patch(patched)
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, memory_format=form)
    t = torch.full((batch,), 500, device=device)
    variants: dict[str, Any] = {
        "fd.patch": lambda: patched(x, t).sample,
        "diffusers eager": lambda: plain(x, t).sample,
    }
    if compiled:
        fast, fast_patched = (torch.compile(net, dynamic=False) for net in (plain, patched))
        variants["diffusers torch.compile"] = lambda: fast(x, t).sample
        variants["fd.patch, torch.compile"] = lambda: fast_patched(x, t).sample

    def check() -> float:
        wanted = plain(x, t).sample
        worst = float((patched(x, t).sample - wanted).norm() / wanted.norm())
        assert worst <= 1e-5, worst
        return worst

    layout = "channels_last" if last else "NCHW"
    return Case(f"diffusers {name}, batch {batch}, fp32, {layout}", "fd.patch", variants, check, unit="ms")


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    if quick:
        yield case("small 32x32", SMALL.diffusers, 4, device=device, last=True, compiled=False)
        return
    for last in (False, True):
        # compiling takes longer than all else, and channels_last is what it is fastest with
        yield case("DDPM CIFAR-10", DDPM.diffusers, 4, device=device, last=last, compiled=last)
