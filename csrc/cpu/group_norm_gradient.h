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
    blocks<4>(panel, [&](auto block) FASTDIFF_INLINE {
        block.fetch_next(x, panel.x_stride, panel.width);
        block.fetch_next(dy, panel.joined_stride, panel.width);
        if (LEAVES != NOTHING) block.template fetch_next<true>(dx, panel.x_stride, panel.width);
        const Affine to(numbers, block.column);
        const F32 slope = ACT ? to.gain * (1 / MINUS_LOG2_E) : to.gain;
        F32 sum[SUMS] = {};
#pragma GCC unroll 4
        for (int r = 0; r < block.rows; ++r) {
            const int64_t row = block.row + r, own = row * panel.x_stride + block.column;
            const F32 d = block.within(block.read(x + own) - to.centre);
            const F32 given = block.read(dy + row * panel.joined_stride + block.column);
            const F32 dn = block.within(inner<ACT>(to, given, d));
            sum[DN] += dn, sum[DN_X] = multiply_add(dn, d, sum[DN_X]);
            if (SUMS > X) sum[SUMS - 1] += d;
            if (LEAVES != NOTHING) block.write(dx + own, LEAVES == OUTER ? slope * dn : dn);
        }
        for (int k = 0; k < SUMS; ++k) add_to(sums.of(k, block.column), sum[k]);
    });
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
