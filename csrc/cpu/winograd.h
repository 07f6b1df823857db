// Winograd's F(4x4, 3x3), Lavin & Gray 2016: 4x4 outputs from 6x6 inputs by 36 products in place of 144.
//
//     y = A' [(G w G') * (B' d B)] A,   points 0, 1, -1, 2, -2, infinity
//
// Each function here is one axis of a transform. G is (1/4, -1/6, -1/6, 1/24, 1/24, 1) times whole numbers; the fractions
// are left to A', where multiplying costs nothing, since the weights are transformed again in every call.
#pragma once

#include "group_norm_vector.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

constexpr int POINTS = 6, TILE_OUT = 4;

// B' d
FASTDIFF_INLINE inline void of_input(const F32 (&d)[POINTS], F32 (&v)[POINTS]) {
    const F32 two = splat(2.0f), four = splat(4.0f), five = splat(5.0f);
    const F32 a = multiply_add(-four, d[2], d[4]), b = multiply_add(-four, d[1], d[3]);
    const F32 c = d[4] - d[2], e = d[3] - d[1];
    v[0] = multiply_add(-five, d[2], multiply_add(four, d[0], d[4]));
    v[1] = a + b;
    v[2] = a - b;
    v[3] = multiply_add(two, e, c);
    v[4] = multiply_add(-two, e, c);
    v[5] = multiply_add(-five, d[3], multiply_add(four, d[1], d[5]));
}

// G w without its fractions
FASTDIFF_INLINE inline void of_weight(F32 w0, F32 w1, F32 w2, F32 (&u)[POINTS]) {
    const F32 two = splat(2.0f), even = w0 + w2, far = multiply_add(splat(4.0f), w2, w0);
    u[0] = w0;
    u[1] = even + w1;
    u[2] = even - w1;
    u[3] = multiply_add(two, w1, far);
    u[4] = multiply_add(-two, w1, far);
    u[5] = w2;
}

// A' m with the fractions of G
FASTDIFF_INLINE inline void of_output(const F32 (&m)[POINTS], F32 (&y)[TILE_OUT]) {
    const F32 sixth = splat(-1.0f / 6);
    const F32 a = sixth * (m[1] + m[2]), b = sixth * (m[1] - m[2]), c = m[3] + m[4], d = m[3] - m[4];
    y[0] = multiply_add(splat(1.0f / 24), c, multiply_add(splat(0.25f), m[0], a));
    y[1] = multiply_add(splat(1.0f / 12), d, b);
    y[2] = multiply_add(splat(1.0f / 6), c, a);
    y[3] = multiply_add(splat(1.0f / 3), d, b) + m[5];
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
