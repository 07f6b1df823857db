// GroupNorm, the injection of the time embedding, and SiLU: fastdiff/ops/group_norm_silu.py.
#include "group_norm_apply.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

enum { SUM, SQUARES, MOMENTS };

// rows that fit into the registers, so that their own mean comes off before anything is squared
constexpr int DEEP = LANES == 16 ? 16 : 8;

// Adds the sums of x and of x^2 in double, from squares about a near mean: fp32 loses nothing at any mean / std.
template <typename T>
FASTDIFF_INLINE inline void moments(const Panel& panel, const T* x, const Sums& sums) {
    blocks<DEEP>(panel, [&](auto block) FASTDIFF_INLINE {
        constexpr int rows = decltype(block)::rows;
        const T* from = x + block.row * panel.x_stride + block.column;
        F32 v[rows], s[4] = {}, q[4] = {}, rest[4] = {};
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            v[r] = block.read(from + r * panel.x_stride);
            s[r % 4] = r < 4 ? v[r] : s[r % 4] + v[r];
        }
        const F32 mean = ((s[0] + s[1]) + (s[2] + s[3])) * (1.0f / rows);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const F32 d = v[r] - mean;
            // by a multiplier, which has less to do here than the adder
            rest[r % 4] = r < 4 ? d : multiply_add(d, splat(1.0f), rest[r % 4]);
            q[r % 4] = r < 4 ? d * d : multiply_add(d, d, q[r % 4]);
        }
        const F32 off = (rest[0] + rest[1]) + (rest[2] + rest[3]), spread = (q[0] + q[1]) + (q[2] + q[3]);
        const auto fold = [&](int half, F64 m, F64 o, F64 d) {
            const int64_t column = panel.column + block.column + half * (LANES / 2);
            double *a = sums.of(SUM, column), *b = sums.of(SQUARES, column);
            store(a, load(a) + (m * rows + o));
            store(b, load(b) + (d + m * (m * rows + (o + o))));
        };
        fold(0, first_half(mean), first_half(off), first_half(spread));
        fold(1, second_half(mean), second_half(off), second_half(spread));
    });
}

// Mean and 1 / std of group g, then the numbers by which its channels are transformed.
inline void finish(const Walk& w, const GroupNorm& call, const Place& place, const Slot& slot) {
    const int64_t n = place.image, g = place.group, first = g * w.group, column = w.last ? first : 0;
    const double count = (double)(w.group * w.pixels), pixels = (double)w.pixels;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < w.group; ++i) {
        const double s = total(w, slot, SUM, column + i), a = at(call.in.add, n, first + i, 0);
        sum += s + pixels * a;
        squares += total(w, slot, SQUARES, column + i) + a * (2 * s + pixels * a);
    }
    const double mean = count > 0 ? sum / count : 0, spread = count > 0 ? squares / count - mean * mean : 0;
    // NaN passes: a comparison with it is false
    const double rstd = 1 / __builtin_sqrt((spread < 0 ? 0 : spread) + call.eps);
    float* stats = call.stats + (n * w.groups + g) * 3;
    stats[0] = (float)mean, stats[1] = (float)(mean - (double)stats[0]), stats[2] = (float)rstd;
    prepare(w, call.in, place, mean, rstd, slot);
}

template <typename T, bool ACT>
struct Forward {
    static bool run(const GroupNorm& call) {
        const Walk w = walk(call.in, MOMENTS, APPLIED);
        const auto reduce = [&](const Place& place, const Slot& slot) {
            summed<MOMENTS>(w, place, slot, [&](const Sums& sums) FASTDIFF_INLINE {
                panels(w, place, [&](const Panel& panel) FASTDIFF_INLINE {
                    moments(panel, (const T*)(panel.second ? call.in.x2 : call.in.x) + panel.x, sums);
                });
            });
        };
        const auto middle = [&](const Place& place, const Slot& slot) { finish(w, call, place, slot); };
        const auto write = [&](const Place& place, const Slot& slot) {
            apply<T, ACT>(w, call.in, place, slot, (T*)call.y);
        };
        return FASTDIFF_ISA_NS::run(w, cells(reduce), groups(middle), cells_from_the_last(write));
    }
};

}  // namespace

bool group_norm(const GroupNorm& call) { return for_dtype<Forward>(call); }

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
