// GroupNorm, the injection of the time embedding, and SiLU: fastdiff/ops/group_norm_silu.py.
#include "group_norm_apply.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

enum { SUM, SQUARES, MOMENTS };

// what is added to the channels of a panel; zero in the lanes that are not there
struct Added {
    const float* first;
    bool last;

    Added(const Walk& w, const PerChannel& add, const Place& place, const Panel& panel)
        : first(add.data), last(w.last) {
        if (first) first += place.image * add.image + place.group * w.group + panel.column;
    }

    template <typename Of>
    F32 of(const Of& block, int64_t column) const {
        if (!first) return F32{};
        return last ? block.read(first + column) : block.within(splat(*first));
    }
};

// rows whose sums stay in fp32, and columns that have room for them; rows that make a pivot
constexpr int64_t RUN = 64, STRIP = 1024, FEW = 8;

// Adds the sums of z = x + add and of z^2 in double. A run sums up in fp32, about a mean of a few of its rows: near
// enough to lose nothing at any mean / std, and an eighth of what one row may be off.
template <typename T>
FASTDIFF_INLINE inline void moments(const Panel& panel, const T* x, const Added& add, const Sums& sums) {
    alignas(64) float room[3 * STRIP];
    runs(panel, RUN, STRIP, [&](const Panel& run, int64_t rows) FASTDIFF_INLINE {
        const T* first = x + (run.x - panel.x);
        const int64_t begin = run.column - panel.column;
        const float weight = 1.0f / (float)smaller(rows, FEW);
        once(run, [&](auto block) FASTDIFF_INLINE {
            const T* from = first + block.column;
            F32 sum = block.read(from);
            for (int64_t r = 1; r < smaller(rows, FEW); ++r) sum += block.read(from + r * run.x_stride);
            float* own = room + 3 * block.column;
            store(own, sum * weight), store(own + LANES, F32{}), store(own + 2 * LANES, F32{});
        });
        blocks<8>(run, [&](auto block) FASTDIFF_INLINE {
            float* own = room + 3 * block.column;
            const F32 pivot = load(own);
            block.fetch_next(first, run.x_stride, run.width);
            F32 s[2] = {}, q[2] = {};
#pragma GCC unroll 8
            for (int r = 0; r < block.rows; ++r) {
                const F32 d = block.read(first + (block.row + r) * run.x_stride + block.column) - pivot;
                s[r % 2] += d, q[r % 2] = multiply_add(d, d, q[r % 2]);
            }
            store(own + LANES, load(own + LANES) + (s[0] + s[1]));
            store(own + 2 * LANES, load(own + 2 * LANES) + (q[0] + q[1]));
        });
        once(run, [&](auto block) FASTDIFF_INLINE {
            const float* own = room + 3 * block.column;
            const F32 pivot = load(own), s = load(own + LANES), q = load(own + 2 * LANES);
            const F32 a = add.of(block, begin + block.column);
            const auto fold = [&](int half, F64 p, F64 off, F64 spread) {
                const int64_t column = begin + block.column + half * (LANES / 2);
                double *one = sums.of(SUM, column), *two = sums.of(SQUARES, column);
                store(one, load(one) + (p * (double)rows + off));
                store(two, load(two) + (spread + p * (p * (double)rows + (off + off))));
            };
            fold(0, first_half(pivot) + first_half(a), first_half(s), first_half(q));
            fold(1, second_half(pivot) + second_half(a), second_half(s), second_half(q));
        });
    });
}

// Mean and 1 / std of group g, then the numbers by which its channels are transformed.
inline void finish(const Walk& w, const GroupNorm& call, const Place& place, const Slot& slot) {
    const int64_t n = place.image, g = place.group, column = w.last ? g * w.group : 0;
    const double count = (double)(w.group * w.pixels);
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < w.group; i += w.last ? 1 : w.span)
        sum += total(w, slot, SUM, column + i), squares += total(w, slot, SQUARES, column + i);
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
        const Walk w = walk(call.in, MOMENTS, APPLIED, true);
        const bool merged = !call.in.add.data;
        const auto reduce = [&](const Place& place, const Slot& slot) {
            summed<MOMENTS>(w, place, slot, merged, [&](const Panel& panel, const Sums& sums) FASTDIFF_INLINE {
                const T* x = (const T*)(panel.second ? call.in.x2 : call.in.x) + panel.x;
                moments(panel, x, Added(w, call.in.add, place, panel), sums);
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
