// ln, sin, cos and exp on vectors, by minimax polynomials fitted for fastdiff (relative error of each about 1 ulp).
// No fused multiply-add: only correctly rounded operations, so every ISA returns the same bits.
#pragma once

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

constexpr uint32_t SIGN = 0x80000000;

// Arguments of the next two come as 2^32 u, u in (0, 1]: scaling by a power of two rounds nothing and costs nothing.

// -2 ln u: u = 2^e (1 + f), 1 + f in [sqrt 1/2, sqrt 2)
inline F32 minus_two_ln(F32 scaled) {
    const I32 above = (I32)scaled - 0x4f3504f3;  // the bits of 2^32 sqrt 1/2
    const F32 n = __builtin_convertvector(above >> 23, F32);
    const F32 f = (F32)((above & 0x7fffff) + 0x3f3504f3) - 1.0f, ff = f * f;
    // even and odd powers apart: half the chain
    const F32 odd = ((0x1.38a358p-3f * ff + 0x1.0d8686p-2f) * ff + 0x1.547218p-2f) * ff + 0x1.000228p-1f;
    const F32 even = ((-0x1.05599ap-2f * ff - 0x1.22d98ep-2f) * ff - 0x1.99a01ep-2f) * ff - 0x1.555554p-1f;
    const F32 p = odd * f + even;
    // 2 ln 2 in two parts, the first with few enough bits for an exact product
    return (p * (f * ff) - n * 0x1.7f7d1cp-19f + ff - (f + f)) - n * 0x1.62e4p+0f;
}

struct Pair {
    F32 cosine, sine;
};

// cos and sin of 2 pi u: whole quarters are taken off exactly, what is left stays within pi / 4
inline Pair turn(F32 scaled) {
    // rounds 2^32 u to a multiple of 2^30, whose number the last bits then hold
    const F32 shifted = scaled + 0x1.8p+53f;
    const F32 y = (scaled - (shifted - 0x1.8p+53f)) * 0x1.921fb6p-30f, yy = y * y;
    const F32 s = y + y * yy * ((-0x1.991ed6p-13f * yy + 0x1.1106cap-7f) * yy - 0x1.555544p-3f);
    const F32 c = 1.0f + yy * (yy * ((0x1.9a275cp-16f * yy - 0x1.6c0d2ap-10f) * yy + 0x1.55554cp-5f) - 0.5f);
    const U32 quarter = (U32)shifted << 30;
    const I32 odd = (I32)(quarter << 1) < 0;
    const F32 cosine = odd ? s : c, sine = odd ? c : s;
    return {(F32)((U32)cosine ^ ((quarter + (1u << 30)) & SIGN)), (F32)((U32)sine ^ (quarter & SIGN))};
}

struct Pair64 {
    F64 cosine, sine;
};

constexpr double FARTHEST = 0x1p20;

// cos and sin of up to FARTHEST radians within 2e-9: for results that are rounded to fp32
inline Pair64 turn(F64 angle) {
    // rounds to whole quarters, whose number the last bits then hold
    const F64 shifted = angle * 0x1.45f306dc9c883p-1 + 0x1.8p+52, n = shifted - 0x1.8p+52;
    // pi / 2 in two parts, the first with few enough bits for an exact product
    const F64 y = (angle - n * 0x1.921fb544p+0) - n * 0x1.0b4611a626331p-34, yy = y * y;
    // Taylor's: the first terms left out are y^11 / 11! and y^12 / 12!
    F64 s = yy * (1.0 / 362880) - 1.0 / 5040, c = 1.0 / 40320 - yy * (1.0 / 3628800);
    s = (s * yy + 1.0 / 120) * yy - 1.0 / 6;
    c = ((c * yy - 1.0 / 720) * yy + 1.0 / 24) * yy - 0.5;
    s = y + y * yy * s;
    c = 1.0 + yy * c;
    const U64 quarter = (U64)shifted, odd = U64{} - (quarter & 1);
    const U64 cosine = ((U64)c & ~odd) | ((U64)s & odd), sine = ((U64)s & ~odd) | ((U64)c & odd);
    return {(F64)(cosine ^ (((quarter + 1) & 2) << 62)), (F64)(sine ^ ((quarter & 2) << 62))};
}

// e^x; overflows to inf, underflows through the subnormals to 0, NaN stays NaN
inline F32 exponential(F32 x) {
    x = x > 90.0f ? F32{} + 90.0f : x;
    x = x < -110.0f ? F32{} - 110.0f : x;
    const F32 shifted = x * 0x1.715476p+0f + 0x1.8p+23f, n = shifted - 0x1.8p+23f;
    const F32 y = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    F32 p = 0x1.6d6afep-10f * y + 0x1.12409ap-7f;
    p = p * y + 0x1.5554dp-5f;
    p = p * y + 0x1.555488p-3f;
    p = p * y + 0.5f;
    p = (p * (y * y) + y) + 1.0f;
    // 2^n as a product of two powers, for 2^n itself may be no normal number
    const I32 e = (I32)shifted - 0x4b400000, half = e >> 1;
    return p * (F32)((U32)(half + 127) << 23) * (F32)((U32)(e - half + 127) << 23);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
