// x Phi(x), with the normal distribution's Phi, on vectors: GELU as Hendrycks & Gimpel 2016 have it, without their tanh.
#pragma once

#include "group_norm_vector.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// behind it Phi(-a) < 1e-9 counts as nothing: what fp32 has of 1 + erf is nothing either
constexpr float FARTHEST_TAIL = 6;

// x becomes x Phi(x). 2^(a r(a) - 1) is Phi(-a) for a = |x|, within 7e-9 of it and 6e-4 of itself: the logarithm of a
// normal tail is all but a parabola, and r, fitted for fastdiff by reweighted least squares, has degree 8.
// -inf gives NaN, as -inf 0 does. Measured with its rounding: 1.4e-7 |x| at most.
template <int ROWS>
FASTDIFF_INLINE inline void gelu(F32 (&x)[ROWS]) {
    F32 a[ROWS], t[ROWS];
    FASTDIFF_ROWS a[r] = x[r] < 0.0f ? -x[r] : x[r];
    FASTDIFF_ROWS t[r] = multiply_add(splat(0x1.35d27p-22f), a[r], splat(-0x1.af11e8p-18f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(0x1.e1d92p-15f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(-0x1.ea15c4p-13f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(-0x1.1756d6p-14f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(0x1.cb0e8ap-8f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(-0x1.add568p-5f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(-0x1.d63c1cp-2f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(-0x1.26aecep+0f));
    FASTDIFF_ROWS t[r] = multiply_add(t[r], a[r], splat(-1.0f));
    power(t);
    FASTDIFF_ROWS t[r] = t[r] * (1 / MINUS_LOG2_E);
    // a comparison with NaN is false, so NaN passes
    FASTDIFF_ROWS t[r] = a[r] > FARTHEST_TAIL ? F32{} : t[r];
    FASTDIFF_ROWS x[r] = x[r] * (x[r] > 0.0f ? 1.0f - t[r] : t[r]);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
