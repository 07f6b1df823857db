// The gradient through y = act(A (x - M) + B): what group_norm_silu and inject share of their backward passes.
#pragma once

#include "group_norm_apply.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// sums over the pixels, with n the argument of the SiLU and dn its gradient
enum { DN, DN_X, X, GRADIENT_SUMS };

// dn from dy and x - M
template <bool ACT>
inline F32 inner(const Affine& to, F32 dy, F32 x) {
    return ACT ? dy * silu_slope(multiply_add(to.gain, x, to.offset)) : dy;
}

// what gradient_sums leaves in dx
enum Leaves { NOTHING, INNER, OUTER };

// Adds sum dn, sum dn (x - M) and, of three, sum x - M. dx takes dn or A dn.
template <int SUMS, Leaves LEAVES, bool ACT, typename T>
FASTDIFF_INLINE inline void gradient_sums(const Panel& panel, const T* dy, const T* x, T* dx, const Numbers& numbers,
                                          const Sums& sums) {
    blocks<16>(panel, [&](auto block) FASTDIFF_INLINE {
        const Affine to(numbers, panel.column + block.column);
        const F32 slope = ACT ? to.gain * (1 / MINUS_LOG2_E) : to.gain;
        // four rows apart: a chain of four additions errs less than one of sixteen
        F32 sum[SUMS][4] = {};
#pragma GCC unroll 4
        for (int r = 0; r < block.rows; ++r) {
            const int64_t row = block.row + r, own = row * panel.x_stride + block.column;
            const F32 d = block.within(block.read(x + own) - to.centre);
            const F32 given = block.read(dy + row * panel.joined_stride + block.column);
            const F32 dn = block.within(inner<ACT>(to, given, d));
            sum[DN][r % 4] += dn, sum[DN_X][r % 4] = multiply_add(dn, d, sum[DN_X][r % 4]);
            if (SUMS > X) sum[SUMS - 1][r % 4] += d;
            if (LEAVES != NOTHING) block.write(dx + own, LEAVES == OUTER ? slope * dn : dn);
        }
        for (int k = 0; k < SUMS; ++k)
            add_to(sums.of(k, panel.column + block.column), (sum[k][0] + sum[k][1]) + (sum[k][2] + sum[k][3]));
    });
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
