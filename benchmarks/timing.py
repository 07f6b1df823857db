"""Timing that holds on a shared machine: variants in turn, A B A B, every repetition kept, medians of paired ratios.

On a GPU an op is captured into a graph of many launches, so that the host is not what is measured, and goes round
several sets of buffers, so that the cache is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Variants = dict[str, Call | Sequence[Call]]
"""What is compared, by name: a call, or the same call on several sets of buffers, taken in turn."""

Timer = Callable[[int], float]
"""Seconds of one call, from that many (or somewhat more)."""

LAUNCHES = 20


def _host(calls: Sequence[Call]) -> Timer:
    def timer(loops: int) -> float:
        begin = time.perf_counter()
        for i in range(loops):
            calls[i % len(calls)]()
        return (time.perf_counter() - begin) / loops

    return timer


def _events(calls: Sequence[Call], inside: int = 1) -> Timer:
    """Events around the calls, each of which holds `inside` launches of what is timed."""

    def timer(loops: int) -> float:
        times = -(-loops // inside)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(times):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (times * inside)

    return timer


def _graph(calls: Sequence[Call]) -> Timer:
    """Events around replays of a captured graph; around plain calls where one of them waits for the device."""
    rounds = -(-LAUNCHES // len(calls))
    before = torch.cuda.get_sync_debug_mode()
    try:
        # a failed capture leaves random generators behind in a state of their own: find out first
        torch.cuda.set_sync_debug_mode("error")
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
    except RuntimeError:
        return _events(calls)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return _events([graph.replay], rounds * len(calls))


def interleaved(
    variants: Variants,
    *,
    rounds: int,
    floor: float = 2e-3,
    device: str = "cpu",
    graphs: bool = False,
    warm: int = 2,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of a call, `rounds` repetitions a variant, taken in turn.

    Each repetition loops the call until it lasts about `floor` seconds, or once where that is 0; the first calls of
    each variant (compilation, caches, thread pools), `warm` of them and one more to find out how long it lasts, are not
    counted. graphs: capture them on a CUDA device, for ops; whole loops are run as users run them. pause: seconds in
    front of each repetition, until threads that another variant left spinning have gone to sleep.
    """
    timers: dict[str, Timer] = {}
    loops = {}
    for name, given in variants.items():
        calls = [given] if callable(given) else list(given)
        for call in calls * warm:
            call()
        cuda = device.startswith("cuda")
        timers[name] = (_graph if graphs else _events)(calls) if cuda else _host(calls)
        loops[name] = max(1, round(floor / max(timers[name](1), 1e-7))) if floor else 1
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, timer in timers.items():
            time.sleep(pause)
            taken[name].append(timer(loops[name]))
    return taken


def ratio(taken: dict[str, list[float]], rival: str, ours: str) -> float:
    """Median over the rounds of rival's time by ours: above 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(taken[rival], taken[ours], strict=True))


def buffers(device: str, bytes_moved: int) -> int:
    """Sets of buffers that a row goes round: four times the second-level cache of a GPU; one for what fits into it."""
    if not device.startswith("cuda"):
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if bytes_moved <= cache else -(-4 * cache // bytes_moved)


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes a second of a plain copy, reads and writes counted: what 100 % means for a kernel bound by memory."""
    a = torch.empty(megabytes << 18, dtype=torch.float32, device=device).normal_()
    b = torch.empty_like(a)
    taken = interleaved({"copy": lambda: b.copy_(a)}, rounds=9, device=device, graphs=True)
    return 2 * a.numel() * 4 / statistics.median(taken["copy"])


def launch(device: str) -> float:
    """Seconds of a kernel that does next to nothing: what no small row can go under."""
    one = torch.zeros(1, device=device)
    return statistics.median(
        interleaved({"launch": lambda: one.add_(1)}, rounds=9, device=device, graphs=True)["launch"]
    )
