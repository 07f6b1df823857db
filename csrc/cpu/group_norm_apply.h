// y = act(A (x - M) + B), the pass that group_norm_silu and inject share, and inject's residual.
#pragma once

#include "group_norm_panel.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// floats per channel by which x is transformed
enum { GAIN, CENTRE, OFFSET, APPLIED };

// A, M and B of a group in double: M takes the mean off before anything is multiplied, B corrects M's own rounding. In
// front of the SiLU A and B come in its unit.
inline void prepare(const Walk& w, const Normed& in, const Place& place, double mean, double rstd, const Slot& slot) {
    const double unit = in.act ? (double)MINUS_LOG2_E : 1;
    const int64_t n = place.image, first = place.group * w.group;
    float* numbers = slot.numbers + (w.last ? first : 0);
    for (int64_t i = 0; i < w.group; ++i) {
        const int64_t c = first + i;
        const double scale = 1 + at(in.scale, n, c, 0), gain = at(in.weight, n, c, 1) * rstd;
        const double exact = mean - at(in.add, n, c, 0);
        const float centre = (float)exact;
        const double offset = (at(in.bias, n, c, 0) + gain * ((double)centre - exact)) * scale + at(in.shift, n, c, 0);
        numbers[GAIN * w.padded + i] = (float)(unit * gain * scale);
        numbers[CENTRE * w.padded + i] = centre;
        numbers[OFFSET * w.padded + i] = (float)(unit * offset);
    }
}

struct Affine {
    F32 gain, centre, offset;

    FASTDIFF_INLINE Affine(const Numbers& numbers, int64_t column)
        : gain(numbers.of(GAIN, column)), centre(numbers.of(CENTRE, column)), offset(numbers.of(OFFSET, column)) {}
};

// residual lies as y does
template <typename T, bool ACT, typename R = T>
inline void apply(const Walk& w, const Normed& in, const Place& place, const Slot& slot, T* y,
                  const R* residual = nullptr) {
    panels(w, place, false, [&](const Panel& panel) FASTDIFF_INLINE {
        const Numbers numbers(w, slot, panel);
        const T* x = (const T*)(panel.second ? in.x2 : in.x) + panel.x;
        T* out = y + panel.joined;
        const R* beside = residual ? residual + panel.joined : nullptr;
        blocks<4>(panel, [&](auto block) FASTDIFF_INLINE {
            constexpr int ROWS = decltype(block)::rows;
            block.fetch_next(x, panel.x_stride, panel.width);
            if (beside) block.fetch_next(beside, panel.joined_stride, panel.width);
            block.template fetch_next<true>(out, panel.joined_stride, panel.width);
            const Affine to(numbers, block.column);
            const T* from = x + block.row * panel.x_stride + block.column;
            const int64_t at = block.row * panel.joined_stride + block.column;
            F32 n[ROWS];
            FASTDIFF_ROWS n[r] = multiply_add(to.gain, block.read(from + r * panel.x_stride) - to.centre, to.offset);
            if (ACT) silu(n);
            if (beside) {
                FASTDIFF_ROWS n[r] += block.read(beside + at + r * panel.joined_stride);
            }
            FASTDIFF_ROWS block.write(out + at + r * panel.joined_stride, n[r]);
        });
    });
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
