// The gradients of group_norm_silu: sums of a unit, then dz = rstd (w' dn - mean(w' dn) - xhat mean(w' dn xhat)), the
// means over a group, w' = weight (1 + scale). xhat and the argument of the SiLU come again from x and the statistics.
#include "group_norm_gradient.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// dz = SLOPE dn + TILT (x - M) + LEVEL
enum { SLOPE = APPLIED, TILT, LEVEL, NUMBERS };

struct Statistics {
    double mean, rstd;

    Statistics(const Walk& w, const float* stats, int64_t n, int64_t g) {
        const float* own = stats + (n * w.groups + g) * 3;
        mean = (double)own[0] + (double)own[1], rstd = (double)own[2];
    }
};

// sum dn xhat from sum dn (x - M); `off` is xhat at x = M, which is M's rounding
inline double about_mean(double rstd, double off, double sum, double sum_x) { return rstd * sum_x + off * sum; }

inline void finish(const Walk& w, const GroupNormBackward& call, const Place& place, const Slot& slot) {
    const int64_t n = place.image, g = place.group, first = g * w.group, column = w.last ? first : 0;
    const Statistics stats(w, call.stats, n, g);
    const double pixels = (double)w.pixels, count = larger(1, w.group * w.pixels);
    const auto off_of = [&](int64_t i) {
        const double centre = (double)slot.numbers[CENTRE * w.padded + column + i];
        return stats.rstd * (centre - (stats.mean - at(call.in.add, n, first + i, 0)));
    };
    const auto weight_of = [&](int64_t i) {
        return at(call.in.weight, n, first + i, 1) * (1 + at(call.in.scale, n, first + i, 0));
    };
    double mean_dn = 0, mean_dn_xhat = 0;
    for (int64_t i = 0; i < w.group; ++i) {
        const double dn = total(w, slot, DN, column + i), dn_x = total(w, slot, DN_X, column + i);
        mean_dn += weight_of(i) * dn;
        mean_dn_xhat += weight_of(i) * about_mean(stats.rstd, off_of(i), dn, dn_x);
    }
    mean_dn /= count, mean_dn_xhat /= count;
    for (int64_t i = 0; i < w.group; ++i) {
        const double off = off_of(i), weight = weight_of(i), dn = total(w, slot, DN, column + i);
        const double xhat = about_mean(stats.rstd, off, pixels, total(w, slot, X, column + i));
        float* sums = call.sums + (n * w.channels + first + i) * 3;
        sums[0] = (float)dn;
        sums[1] = (float)about_mean(stats.rstd, off, dn, total(w, slot, DN_X, column + i));
        sums[2] = (float)(stats.rstd * (weight * dn - pixels * mean_dn - xhat * mean_dn_xhat));
        float* numbers = slot.numbers + column + i;
        numbers[SLOPE * w.padded] = (float)(stats.rstd * weight);
        numbers[TILT * w.padded] = (float)(-stats.rstd * stats.rstd * mean_dn_xhat);
        numbers[LEVEL * w.padded] = (float)(-stats.rstd * (mean_dn + off * mean_dn_xhat));
    }
}

// KEPT: dn lies in dx already, and dy is not read
template <bool KEPT, bool ACT, typename T>
FASTDIFF_INLINE inline void write_panel(const Panel& panel, const T* dy, const T* x, T* dx, const Numbers& numbers) {
    blocks<4>(panel, [&](auto block) FASTDIFF_INLINE {
        constexpr int ROWS = decltype(block)::rows;
        block.fetch_next(x, panel.x_stride, panel.width);
        if (!KEPT) block.fetch_next(dy, panel.joined_stride, panel.width);
        block.template fetch_next<true>(dx, panel.x_stride, panel.width);
        const Affine to(numbers, block.column);
        const F32 slope = numbers.of(SLOPE, block.column), tilt = numbers.of(TILT, block.column);
        const F32 level = numbers.of(LEVEL, block.column);
        const int64_t own = block.row * panel.x_stride + block.column;
        const T* given = KEPT ? dx + own : dy + block.row * panel.joined_stride + block.column;
        const int64_t stride = KEPT ? panel.x_stride : panel.joined_stride;
        F32 d[ROWS], dn[ROWS];
        FASTDIFF_ROWS d[r] = block.read(x + own + r * panel.x_stride) - to.centre;
        FASTDIFF_ROWS dn[r] = block.read(given + r * stride);
        if (!KEPT) inner<ACT>(to, d, dn);
        FASTDIFF_ROWS block.write(dx + own + r * panel.x_stride,
                                  multiply_add(slope, dn[r], multiply_add(tilt, d[r], level)));
    });
}

template <typename T, bool ACT>
struct Backward {
    // an fp32 dx has room for dn as it is
    static constexpr bool KEEPS = sizeof(T) == sizeof(float) && ACT;

    static bool run(const GroupNormBackward& call) {
        const Walk w = walk(call.in, GRADIENT_SUMS, NUMBERS);
        const T* dy = (const T*)call.dy;
        const auto dx_of = [&](const Panel& panel) { return (T*)(panel.second ? call.dx2 : call.dx) + panel.x; };
        const auto x_of = [&](const Panel& panel) {
            return (const T*)(panel.second ? call.in.x2 : call.in.x) + panel.x;
        };
        const auto start = [&](const Place& place, const Slot& slot) {
            const Statistics stats(w, call.stats, place.image, place.group);
            prepare(w, call.in, place, stats.mean, stats.rstd, slot);
        };
        const auto reduce = [&](const Place& place, const Slot& slot) {
            summed<GRADIENT_SUMS>(w, place, slot, false, [&](const Panel& panel, const Sums& sums) FASTDIFF_INLINE {
                gradient_sums<GRADIENT_SUMS, KEEPS ? INNER : NOTHING, ACT>(
                    panel, dy + panel.joined, x_of(panel), dx_of(panel), Numbers(w, slot, panel), sums);
            });
        };
        const auto middle = [&](const Place& place, const Slot& slot) { finish(w, call, place, slot); };
        const auto write = [&](const Place& place, const Slot& slot) {
            panels(w, place, false, [&](const Panel& panel) FASTDIFF_INLINE {
                write_panel<KEEPS, ACT>(panel, dy + panel.joined, x_of(panel), dx_of(panel), Numbers(w, slot, panel));
            });
        };
        return FASTDIFF_ISA_NS::run(w, groups(start), cells(reduce), groups(middle), cells_from_the_last(write));
    }
};

}  // namespace

bool group_norm_backward(const GroupNormBackward& call) { return for_dtype<Backward>(call); }

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
