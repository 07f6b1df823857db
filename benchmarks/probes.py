"""What is measured beside the time: kernels a step, memory, and the share of a step that is not the network."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.nets import Setting
from benchmarks.timing import interleaved, ratio
from benchmarks.variants import Ready, captured, graph_of
from fastdiff.sampling.state import Kind, State


class Outside(NamedTuple):
    """A step and the network in it, both captured."""

    step: list[float]
    """Seconds, each round's."""
    network: list[float]
    share: float
    """1 - network / step, median of the rounds."""


def settle(device: str, *, every: bool = False) -> None:
    """Give back what nobody holds, so that memory can be compared; every: cycles too, which takes a while."""
    if every:
        gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def held(device: str) -> int:
    """Bytes that the allocator has from the device."""
    return torch.cuda.memory_reserved() if device.startswith("cuda") else 0


def peak(device: str, call: Callable[[], object]) -> int:
    """Bytes that a call takes beside what was there before it."""
    if not device.startswith("cuda"):
        call()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies on the device in a call."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


FEW, MANY = 4, 12
STEPS = 2 * FEW + MANY
"""That `kernels` takes."""


def kernels(device: str, ready: Ready, few: int = FEW, many: int = MANY) -> float | None:
    """Kernels a step: those of a long run without those of a short one; None where none are seen."""
    if not device.startswith("cuda"):
        return None
    ready.run(few)
    found = (launches(partial(ready.run, many)) - launches(partial(ready.run, few))) / (many - few)
    return found if found > 0 else None


def outside(setting: Setting, net: str, backend: str, *, steps: int, rounds: int) -> Outside:
    """The share of a step that is not the network: a captured step against the captured network on the same buffers."""
    den = setting.nets.denoiser(net)
    with fd.backend(backend), torch.no_grad(), fd.Sampler(den, setting.shape, run=graph_of(setting)) as fast:
        fast("ddim", steps=steps, x=setting.x, cond=setting.cond, clip=1.0)
        # the engine's own buffers and graphs: a call of the sampler would also time what it does before the first row
        ((state, made),) = fast._held.values()
        kind = Kind(len(state.x_in))
        alone = captured(setting, lambda: _network(den.net, state))

        def step() -> None:
            state.k.zero_()
            made.run(kind, steps)

        state.k.zero_()
        taken = interleaved(
            {"step": step, "network": partial(alone.run, steps)}, rounds=rounds, device=setting.device, warm=0
        )
        alone.close()
    each = {name: [s / steps for s in seconds] for name, seconds in taken.items()}
    return Outside(each["step"], each["network"], 1 - ratio(taken, "network", "step"))


def _network(net: Callable[..., Tensor], state: State) -> Tensor:
    """F of the next row, as the step asks for it."""
    if state.table is not None:
        return net(state.x_in, None, state.cond, table_row=state.table.index_select(0, state.k)[0])
    return net(state.x_in, state.times.index_select(0, state.k).expand(len(state.x_in)), state.cond)
