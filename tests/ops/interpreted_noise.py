"""The noise in Triton kernels, run by the interpreter: bits of the uniforms, accuracy of the normals, grids."""

import pytest
import torch
import triton
import triton.language as tl

from fastdiff.ops import normal_triton, philox
from fastdiff.ops.philox_triton import (
    blocks_of,
    counter_word,
    images_grid,
    normals,
    normals_at,
    random_words,
    turn,
    unit,
)

SEED, INDEX = philox.seed_tensor(2**63 + 12345), torch.tensor([0, 5, 2**32 - 1, 2**40 + 3, 2**62])
PLACES = [(0, 0), (2**24 - 1, 255), (77, 128), (5, 1)]


@triton.jit
def _uniforms(seed, index, u, counter, COUNT: tl.constexpr):
    n = tl.program_id(0)
    block = tl.arange(0, COUNT // 4)
    words = random_words(tl.load(seed), block, counter, tl.load(index + n))
    for j in tl.static_range(4):
        tl.store(u + n * COUNT + 4 * block + j, unit(words[j]))


@triton.jit
def _normals(seed, index, z, counter, first, COUNT: tl.constexpr, WIDE: tl.constexpr, ALONE: tl.constexpr):
    n = tl.program_id(0)
    i = tl.arange(0, COUNT)
    if ALONE:
        drawn = normals_at(tl.load(seed), first + i, counter, tl.load(index + n))
    else:
        drawn = normals(tl.load(seed), blocks_of(first, COUNT, WIDE), counter, tl.load(index + n), [COUNT], WIDE)
    tl.store(z + n * COUNT + i, drawn)


@triton.jit
def _turns(u, below, c, s, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    cosine, sine = turn(tl.load(u + i), tl.load(below + i))
    tl.store(c + i, cosine)
    tl.store(s + i, sine)


@pytest.mark.parametrize(("step", "stream"), PLACES)
def test_uniforms_are_the_same_bits(step, stream):
    u = torch.full((len(INDEX), 512), torch.nan)
    _uniforms[(len(INDEX),)](SEED, INDEX, u, counter_word(step, stream), COUNT=512)
    assert torch.equal(u, philox.uniform(SEED, INDEX, step, stream, (512,)))


@pytest.mark.parametrize("way", ["a block a thread", "two blocks", "each its own"])
@pytest.mark.parametrize("first", [0, 4, 4096])
def test_normals(way, first):
    z = torch.full((len(INDEX), 256), torch.nan)
    flags = {"WIDE": way == "two blocks", "ALONE": way == "each its own"}
    _normals[(len(INDEX),)](SEED, INDEX, z, counter_word(9, 130), first, COUNT=256, **flags)
    wanted = philox.normal(SEED, INDEX, 9, 130, (first + 256,), torch.float64)[:, first:]
    assert (z - wanted).abs().max() <= 1e-6


def test_turn():
    g = torch.Generator().manual_seed(0)
    exact = torch.rand(4096, generator=g, dtype=torch.float64)
    exact[:9] = torch.arange(9) / 8
    u = exact.float()
    below = (exact - u.double()).float()
    c, s = torch.empty(2, 4096)
    _turns[(1,)](u, below, c, s, COUNT=4096)
    angle = 2 * torch.pi * (u.double() + below.double())
    assert (c - angle.cos()).abs().max() <= 1.5e-7
    assert (s - angle.sin()).abs().max() <= 1.5e-7


@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (3, 32, 32), (1025,), (0,), (2, 0, 3)])
def test_normal(shape):
    wanted = philox.normal(SEED, INDEX, 11, 200, shape, torch.float64)
    got = normal_triton.run(SEED, INDEX, 11, 200, shape)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert ((got - wanted).abs() <= 1e-6).all()
    assert normal_triton.run(SEED, INDEX[:0], 11, 200, shape).shape == (0, *shape)


def test_a_grid_holds_every_image():
    for images in (1, 2, 65535, 65536, 131070, 131071, 10**6):
        blocks, a, b = images_grid(7, images)
        assert blocks == 7
        assert max(a, b) <= 65535
        assert images <= a * b < images + b


def test_images_over_two_axes_of_the_grid():
    z = torch.full((5, 40), torch.nan)
    normal_triton.normal_kernel[(1, 3, 2)](SEED, INDEX, z, counter_word(1, 2), 5, 40, COUNT=1024)
    assert torch.equal(z, normal_triton.run(SEED, INDEX, 1, 2, (40,)))
