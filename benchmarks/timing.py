"""Timing that holds on a shared machine: variants in turn, A B A B, every repetition kept, medians of paired ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Variants = dict[str, Callable[[], object]]


def _once(f: Callable[[], object], loops: int, cuda: bool) -> float:
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(loops):
            f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / loops
    begin = time.perf_counter()
    for _ in range(loops):
        f()
    return (time.perf_counter() - begin) / loops


def interleaved(variants: Variants, *, rounds: int, floor: float = 2e-3, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of a call, `rounds` repetitions a variant, taken in turn.

    Each repetition loops the call until it lasts about `floor` seconds; the first call of each variant (compilation,
    caches, thread pools) is not counted.
    """
    cuda = device.startswith("cuda")
    loops = {}
    for name, f in variants.items():
        for _ in range(2):
            f()
        loops[name] = max(1, round(floor / max(_once(f, 1, cuda), 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, f in variants.items():
            taken[name].append(_once(f, loops[name], cuda))
    return taken


def ratio(taken: dict[str, list[float]], rival: str, ours: str) -> float:
    """Median over the rounds of rival's time by ours: above 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(taken[rival], taken[ours], strict=True))


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes a second of a plain copy, reads and writes counted: what 100 % means for a kernel bound by memory."""
    a = torch.empty(megabytes << 18, dtype=torch.float32, device=device).normal_()
    b = torch.empty_like(a)
    taken = interleaved({"copy": lambda: b.copy_(a)}, rounds=9, device=device)
    return 2 * a.numel() * 4 / statistics.median(taken["copy"])
