// The gradient through y = act(A (x - M) + B): what group_norm_silu and inject share of their backward passes.
#pragma once

#include "group_norm_apply.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// sums over the pixels, with n the argument of the SiLU and dn its gradient
enum { DN, DN_X, X, GRADIENT_SUMS };

// dn, which begins as dy, from d = x - M
template <bool ACT, int ROWS>
FASTDIFF_INLINE inline void inner(const Affine& to, const F32 (&d)[ROWS], F32 (&dn)[ROWS]) {
    if (!ACT) return;
    F32 slope[ROWS];
    FASTDIFF_ROWS slope[r] = multiply_add(to.gain, d[r], to.offset);
    silu_slope(slope);
    FASTDIFF_ROWS dn[r] = dn[r] * slope[r];
}

// what gradient_sums leaves in dx
enum Leaves { NOTHING, INNER, OUTER };

// Adds sum dn, sum dn (x - M) and, of three, sum x - M. dx takes dn or A dn.
template <int SUMS, Leaves LEAVES, bool ACT, typename T>
FASTDIFF_INLINE inline void gradient_sums(const Panel& panel, const T* dy, const T* x, T* dx, const Numbers& numbers,
                                          const Sums& sums) {
    blocks<4>(panel, [&](auto block) FASTDIFF_INLINE {
        constexpr int ROWS = decltype(block)::rows;
        block.fetch_next(x, panel.x_stride, panel.width);
        block.fetch_next(dy, panel.joined_stride, panel.width);
        if (LEAVES != NOTHING) block.template fetch_next<true>(dx, panel.x_stride, panel.width);
        const Affine to(numbers, block.column);
        const F32 slope = ACT ? to.gain * (1 / MINUS_LOG2_E) : to.gain;
        const int64_t own = block.row * panel.x_stride + block.column;
        const T* given = dy + block.row * panel.joined_stride + block.column;
        F32 sum[SUMS] = {}, d[ROWS], dn[ROWS];
        FASTDIFF_ROWS d[r] = block.within(block.read(x + own + r * panel.x_stride) - to.centre);
        FASTDIFF_ROWS dn[r] = block.read(given + r * panel.joined_stride);
        inner<ACT>(to, d, dn);
        FASTDIFF_ROWS dn[r] = block.within(dn[r]);
        FASTDIFF_ROWS {
            sum[DN] += dn[r], sum[DN_X] = multiply_add(dn[r], d[r], sum[DN_X]);
            if (SUMS > X) sum[SUMS - 1] += d[r];
            if (LEAVES != NOTHING) block.write(dx + own + r * panel.x_stride, LEAVES == OUTER ? slope * dn[r] : dn[r]);
        }
        for (int k = 0; k < SUMS; ++k) add_to(sums.of(k, block.column), sum[k]);
    });
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
