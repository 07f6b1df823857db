"""The noise of `fastdiff.ops.philox` inside Triton kernels: four normals of one Philox block, side by side in memory.

On NVIDIA GPUs Box-Muller takes the special-function unit (lg2, sqrt, sin, cos), which Triton reaches by inline PTX
only; elsewhere, the interpreter included, a logarithm, a square root and two polynomials.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops import jit

INTERPRETED = tl.constexpr(jit.INTERPRETED)

# $0, $1 = r cos, r sin of $2 = u0, $3 = u1. The angle is taken in (-pi, pi], where sin and cos are at their best: half
# a circle less, hence -r. Constants: -2 ln 2, -1/2, 2 pi.
BOX_MULLER = tl.constexpr(
    """{
    .reg .f32 r, a, c, s;
    lg2.approx.ftz.f32 r, $2;
    mul.f32 r, r, 0fBFB17218;
    max.f32 r, r, 0f00000000;
    sqrt.approx.ftz.f32 r, r;
    add.f32 a, $3, 0fBF000000;
    mul.f32 a, a, 0f40C90FDB;
    cos.approx.ftz.f32 c, a;
    sin.approx.ftz.f32 s, a;
    neg.f32 r, r;
    mul.f32 $0, r, c;
    mul.f32 $1, r, s;
    }"""
)


def run_length(numbers: int) -> int:
    """How many numbers of one image a block of 128 threads handles: the more, the cheaper the key and the row are.

    Few where there is too little work for the whole device.
    """
    return 2048 if numbers >= 1 << 20 else 1024


def images_grid(blocks: int, images: int) -> tuple[int, int, int]:
    """(blocks, a, b) with a * b >= images: axes 1 and 2 of a grid end at 65535, `this_image` reads them."""
    deep = -(-images // 65535)
    return blocks, -(-images // deep), deep


def oversized(*images: Tensor | None) -> str | None:
    """Why kernels that address one image by 32 bits, each of them by 64, cannot take these, None when they can."""
    for x in images:
        if x is not None and sum((n - 1) * abs(s) for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**30:
            return f"one image must lie within 2^30 numbers, got {tuple(x.shape)} with strides {x.stride()}"
    return None


def counter_word(step: int, stream: int) -> int:
    """step | stream << 24 as a signed number of 32 bits, so that Triton sees one type for all streams."""
    word = step | stream << 24
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def this_image():
    """The image of this block in a grid made by `images_grid`."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def random_words(seed, block, step_and_stream, index):
    """The four 32-bit words of Philox4x32-10 for the blocks of one image; csrc/philox.h has the layout."""
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + tl.cast(step_and_stream, tl.uint32)
    c2 = tl.zeros_like(c0) + index.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (index >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # one 32 x 32 to 64 bit multiplication gives both halves; tl.umulhi takes three instructions more
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    """u = float(word) 2^-32 + 2^-33; the product is exact, so a fused multiply-add changes nothing."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def turn(u, below):
    """(cos, sin)(2 pi (u + below)) to 1e-7; below is what rounding took off u."""
    quarter = tl.floor(4 * u + 0.5)
    # whole quarters come off exactly: the angle stays within pi / 4 and keeps its last bits
    rest = (u - 0.25 * quarter) + below
    # 2 pi in two parts
    a = rest * 6.2831854820251465 + rest * -1.7484555314695172e-07
    q = quarter.to(tl.int32)
    a2 = a * a
    # the polynomials of csrc/cpu/functions.h
    s = a + a * a2 * ((-0.000195083834 * a2 + 0.00833210815) * a2 + -0.166666538)
    c = 1 + a2 * (a2 * ((2.44470684e-05 * a2 + -0.00138874596) * a2 + 0.0416666493) - 0.5)
    odd = (q & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((q + 1) & 2) == 2, -cosine, cosine), tl.where((q & 2) == 2, -sine, sine)


@triton.jit
def box_muller(u0, u1):
    """r (cos, sin)(2 pi u1), r = sqrt(-2 ln u0)."""
    if INTERPRETED:
        r = tl.sqrt(tl.maximum(-2 * tl.log(u0), 0.0))
        c, s = turn(u1, 0.0)
        return r * c, r * s
    elif tl.target_info.is_cuda():
        return tl.inline_asm_elementwise(
            BOX_MULLER, "=f,=f,f,f", [u0, u1], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        r = tl.sqrt(tl.maximum(-2 * tl.log(u0), 0.0))
        c, s = turn(u1, 0.0)
        return r * c, r * s


@triton.jit
def four_normals(seed, block, step_and_stream, index):
    """The standard normals at positions 0, 1, 2, 3 of the blocks."""
    w0, w1, w2, w3 = random_words(seed, block, step_and_stream, index)
    n0, n1 = box_muller(unit(w0), unit(w1))
    n2, n3 = box_muller(unit(w2), unit(w3))
    return n0, n1, n2, n3


@triton.jit
def blocks_of(first, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """The blocks that `normals` takes for COUNT positions from `first` on, a multiple of 4."""
    if WIDE:
        return first // 4 + 2 * tl.arange(0, COUNT // 8)
    else:
        return first // 4 + tl.arange(0, COUNT // 4)


@triton.jit
def normals(seed, block, step_and_stream, index, SHAPE: tl.constexpr, WIDE: tl.constexpr):
    """Standard normals in SHAPE, whose last axis holds the four positions of each block; of each and its next if WIDE.

    So a thread has 4 neighbours, or 8: 16 bytes of the result's dtype, which interleaved in registers are one store.
    """
    n0, n1, n2, n3 = four_normals(seed, block, step_and_stream, index)
    if WIDE:
        m0, m1, m2, m3 = four_normals(seed, block + 1, step_and_stream, index)
        n0, n1, n2, n3 = tl.join(n0, m0), tl.join(n1, m1), tl.join(n2, m2), tl.join(n3, m3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(SHAPE)


@triton.jit
def normals_at(seed, i, step_and_stream, index):
    """Standard normals at the positions i, each from a block of its own: where neighbours in a tile share none."""
    w0, w1, w2, w3 = random_words(seed, i // 4, step_and_stream, index)
    late = i % 4 >= 2
    c, s = box_muller(unit(tl.where(late, w2, w0)), unit(tl.where(late, w3, w1)))
    return tl.where(i % 2 == 0, c, s)
