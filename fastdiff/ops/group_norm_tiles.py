"""How the GPU kernels of group_norm_silu and inject cut a tensor up: chosen on the host, from the shape alone.

    one pass   a block holds whole groups of one image in registers: x is read once and y written once
    split      a block holds a tile of channels x pixels and walks over `steps` of them; the sums over all pixels are
               partial, one a block, and a small kernel adds them up in a fixed order

The numbers to tune on a device are the capitals below and the two rules of `choose`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import group_norm_call, native
from fastdiff.ops.group_norm_call import Given

ONE_PASS = {("forward", 2): 32768, ("forward", 4): 32768, ("backward", 2): 16384, ("backward", 4): 8192}
"""Most elements that a block holds, padding included (backward: of x, and as many of dy), by bytes an element."""

ONE_PASS_LAST = {"forward": 16384, "backward": 8192}
"""The same for channels_last, where a thread also holds the numbers of eight channels. More would spill."""

ALONE = 8192
"""A slab of at most this many elements goes in one pass however few there are: three launches cost more than it."""

BUSY = 0.5
"""Larger slabs go in one pass where there are this many a multiprocessor, and are split where there are fewer."""

TILE = 4096
"""Elements of a split tile: 16 a thread of 8 warps."""

BLOCKS = 8
"""Split blocks a multiprocessor: two waves of the four or so that fit."""

STEPS = 64
"""Most tiles that one block adds up: it bounds the rounding of the sums."""

ENTRIES = 512
"""Partial sums that a block of the small kernels, one a group, adds up at a time."""

WASTE = 1.5
"""Most padding of a slab of channels_last, whose lanes work for nothing, in a tensor of more than SMALL elements."""

SMALL = 2**23

SLAB_ROW = 256
"""Bytes of a row of one channels-last slab that need no widening."""


MOST_PIXELS = 2**31 - 2**20
"""Of an image: positions in a channel are 32-bit numbers, offsets in a tensor 64-bit ones."""


class Tiles(NamedTuple):
    """A block's tile, block_c channels x block_p pixels; in one pass `slab` of those channels are used."""

    block_c: int
    block_p: int
    warps: int
    steps: int
    splits: int
    slab: int = 0

    @property
    def one_pass(self) -> bool:
        """Whether a block holds all pixels of whole groups."""
        return self.slab > 0


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def _width(size: int, most: int, least: int) -> int:
    """A power of two from `least` to `most` that covers `size` in steps with an eighth of waste, if there is one."""
    width = min(power(size), most)
    while width > least and blocks(size, width) * width > 1.125 * size:
        width //= 2
    return width


def split(n: int, channels: int, pixels: int, last: bool, multiprocessors: int) -> Tiles:
    """Tiles for the kernels that walk. Rows in memory stay at least 64 long where the tensor's are."""
    if last:
        block_c = _width(channels, 64, 32)
        block_p = max(1, min(TILE // block_c, power(pixels)))
    else:
        block_p = _width(pixels, TILE, 64)
        block_c = min(TILE // block_p, power(channels))
    tiles = blocks(pixels, block_p)
    rows = n * blocks(channels, block_c)
    splits = max(1, min(tiles, max(blocks(BLOCKS * multiprocessors, max(rows, 1)), blocks(tiles, STEPS))))
    steps = blocks(tiles, splits)
    # where a thread holds numbers of several channels, fewer threads compute them
    warps = max(1, min(8, block_c * block_p // (512 if block_c == 1 else 1024)))
    return Tiles(block_c, block_p, warps, steps, blocks(tiles, max(steps, 1)))


def slabs(channels: int, group: int, size: int, last: bool) -> list[int]:
    """How many channels one block of the one-pass kernel may take, best first: whole groups.

    In channels_last they are whole 16-byte words too, and better whole sectors of 32 bytes, since two blocks read the
    sector that they share. A group of 64 bytes needs no other beside it. The last slab may be short of channels.
    """
    if not last or (group * size % 16 == 0 and group * size >= 64):
        return [group]
    wide = [min(math.lcm(group, row // size), channels) for row in (32, 16)]
    return [w for w in wide if w * size <= SLAB_ROW or w == wide[-1]]


def choose(
    n: int, channels: int, pixels: int, groups: int, last: bool, size: int, multiprocessors: int, backward: bool = False
) -> Tiles:
    """The tiles of group_norm_silu: one pass where a slab fits and slabs keep the device busy, else split.

    size: bytes an element; last: channels_last.
    """
    way = "backward" if backward else "forward"
    most = ONE_PASS_LAST[way] if last else ONE_PASS[way, size]
    for slab in slabs(channels, channels // groups, size, last):
        elements = power(slab) * power(pixels)
        busy = slab * pixels <= ALONE or n * blocks(channels, slab) >= BUSY * multiprocessors
        tight = not last or elements <= WASTE * slab * pixels or n * channels * pixels <= SMALL
        if elements <= most and busy and tight:
            # the backward of a channels-first tile keeps x and dy: half as many a thread
            warps = power(slab * pixels // 400 + 1) // 2 if backward and not last else elements // 1024
            return Tiles(power(slab), power(pixels), max(1, min(16, warps)), 1, 1, slab)
    return split(n, channels, pixels, last, multiprocessors)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; an H100's on a machine without one, where kernels are interpreted or only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def numbers(given: Given) -> tuple[Tensor | int | None, ...]:
    """The small tensors and strides, in the order of the kernels' arguments."""
    return *given.small, *map(native.apart, given.small[2:])


def block(given: Given, plan: Tiles) -> dict[str, int | bool]:
    """The kernels' keywords for these tiles."""
    _, channels, pixels = given.sizes
    rows = (int(given.x.shape[1]), channels) if given.last else (pixels,)
    # elements in a row that can be read as one word
    vector = math.gcd(16 // given.x.element_size(), *rows)
    return {
        "BLOCK_C": plan.block_c,
        "BLOCK_P": plan.block_p,
        "LAST": given.last,
        "VECTOR": vector,
        "FULL": channels % plan.block_c == 0 == pixels % plan.block_p and plan.slab in (0, plan.block_c),
        "num_warps": plan.warps,
    }


def whole_slabs(given: Given, plan: Tiles, group: int) -> dict[str, int | bool]:
    """The one-pass kernels' further keywords."""
    whole = given.sizes[1] % plan.slab == 0
    return {"GROUP": group, "SLAB": plan.slab, "GROUPS": power(plan.slab // group), "WHOLE": whole}


def refuses(x: Tensor, x2: Tensor | None = None) -> str | None:
    """Why the kernels do not take x and x2, None when they do."""
    if math.prod(x.shape[2:]) > MOST_PIXELS:
        return f"an image has {math.prod(x.shape[2:])} pixels; the Triton kernel takes at most {MOST_PIXELS}"
    return group_norm_call.refuses("Triton", x, x2)
