"""One forward pass of the U-Net: ours against diffusers' with the same weights, each at its best known setting."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.case import Case
from fastdiff.formats.diffusers import read_unet2d

CIFAR10: dict[str, Any] = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SMALL: dict[str, Any] = {
    **CIFAR10,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def pair(config: dict[str, Any], device: str) -> tuple[Any, Any]:
    """diffusers' network with random weights, and ours with the same."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    theirs = UNet2DModel(**config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, _ = read_unet2d(folder)
    return ours.eval().to(device), theirs.to(device)


def case(name: str, config: dict[str, Any], batch: int, *, device: str, compiled: bool) -> Case:
    """One network at one batch size."""
    ours, theirs = pair(config, device)
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.full((batch,), 500, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    theirs_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    variants: dict[str, Any] = {
        "ours": lambda: ours(x, t),
        "diffusers eager": lambda: theirs(x, t).sample,
        "diffusers eager, channels_last": lambda: theirs_last(last, t).sample,
    }
    if compiled:
        options = {"freezing": True} if device == "cpu" else None
        fast = torch.compile(theirs, dynamic=False, options=options)
        variants["diffusers torch.compile" + (", freezing" if options else "")] = lambda: fast(x, t).sample

    def check() -> float:
        wanted = theirs(x, t).sample
        worst = float((ours(x, t) - wanted).norm() / wanted.norm())
        assert worst <= 1e-5, worst
        return worst

    return Case(f"U-Net {name}, batch {batch}, fp32", "ours", variants, check, unit="ms")


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    if quick:
        yield case("small 32x32", SMALL, 4, device=device, compiled=False)
        return
    for batch in (1, 4, 16):
        yield case("DDPM CIFAR-10", CIFAR10, batch, device=device, compiled=True)
