"""What a device cannot go beyond: its measured matrix product and copy, and image-steps/s of a network that follow.

A step of one image takes at least  flop / matmul rate + bytes / copy bandwidth;  the bytes are those of the norms and
of what else no convolution can take over, counted for each way of running the norms.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from benchmarks.models import Model
from benchmarks.timing import interleaved

WAYS = ("matmul only", "norms in one pass", "norms in two passes", "unfused")

H100: dict[str, tuple[float, ...]] = {
    "DDPM-CIFAR10": (64.1e3, 46.0e3, 41.7e3, 29.8e3),
    "EDM-CIFAR-like": (18.8e3, 14.4e3, 13.3e3, 10.0e3),
    "ADM-64": (3638.0, 2957.0, 2766.0, 2195.0),
}
"""Image-steps/s of the published networks, computed for MATMUL and COPY, one for each of WAYS."""

MATMUL, COPY = 798e12, 3.0e12
"""FLOP/s in bf16 and bytes/s, read and written, of the H100 that they are computed for."""


class Speed(NamedTuple):
    """What was measured of a device."""

    name: str
    matmul: float
    """FLOP/s."""
    copy: float
    """Bytes/s, reads and writes counted."""


def matmul_rate(device: str, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, in bf16 on a GPU and fp32 elsewhere."""
    cuda = device.startswith("cuda")
    n = size or (8192 if cuda else 512)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    c = torch.empty_like(a)
    taken = interleaved({"matmul": lambda: torch.mm(a, b, out=c)}, rounds=9, floor=2e-2, device=device)
    return 2 * n**3 / statistics.median(taken["matmul"])


def peaks() -> tuple[float, float]:
    """FLOP/s on a CPU in fp32, the best of some calls in turn: of torch.mm, 512 x 512 x 512, and of torch's 3x3
    convolution, 128 to 128 channels, 32x32, batch 4."""
    a, b, x = torch.randn(512, 512), torch.randn(512, 512), torch.randn(4, 128, 32, 32)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        taken = interleaved({"mm": lambda: a @ b, "conv": lambda: conv(last)}, rounds=25, floor=1e-2)
    return 2 * 512**3 / min(taken["mm"]), 2 * 9 * 128 * x.numel() / min(taken["conv"])


def ceilings(model: Model, flop: float, speed: Speed) -> tuple[float, ...]:
    """Image-steps/s of a network of `flop` an image, one for each of WAYS; the first alone where no bytes are counted.

    On an H100 those of the table, which also says what others can do: the bytes are what it copies in the time beside
    the matrix products. A network of another size than the published one is scaled.
    """
    known = H100.get(model.name)
    if known is None or model.gflop is None:
        return (speed.matmul / flop,)
    larger = flop / (1e9 * model.gflop)
    if "H100" in speed.name:
        return tuple(rate / larger for rate in known)
    moved = [(1 / rate - 1 / known[0]) * COPY for rate in known]
    return tuple(1 / (flop / speed.matmul + larger * b / speed.copy) for b in moved)
