"""What a captured step depends on outside its buffers: where weights lie, and what decides which kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdiff.ops import dispatch
from fastdiff.sampling.guidance import networks
from fastdiff.sampling.state import Program


class Weights:
    """Where the tensors of the networks lie. A graph reads them there, whatever has become of the networks since."""

    def __init__(self, program: Program) -> None:
        modules = [m for net in networks(program.net, program.energies) for m in net.modules()]
        self._tensors = [held for m in modules for held in (m._parameters, m._buffers) if held]
        self._modules = [m._modules for m in modules if m._modules]

    def signature(self) -> tuple[list[int], list[Any]]:
        """Tensors and their addresses, and which modules there are: fast, for it is asked before each loop."""
        tensors = [t for held in self._tensors for t in held.values() if t is not None]
        return (
            # a tensor subclass that wraps others has no address
            [part for t in tensors for part in (id(t), t.data_ptr())],
            [part for held in self._modules for m in held.values() for part in (id(m), type(m))],
        )


def settings(device: torch.device) -> tuple[Any, ...]:
    """What decides, beside its tensors, which kernels a step runs."""
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    return (
        dispatch.asked(),
        torch.get_autocast_dtype(device.type) if casts else None,
        # the older names raise once somebody has used these
        *(b.fp32_precision for b in (cuda.matmul, cudnn.conv)),
        *(
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


@contextmanager
def casting() -> Iterator[None]:
    """Autocast keeps copies of weights until its block ends; a graph would go on reading them. So none are kept."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def fastest(benchmark: bool) -> Iterator[None]:
    """cuDNN keeps, for a thread, what it finds fastest for each shape that it has not met before."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
