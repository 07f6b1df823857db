// How the kernels of group_norm_silu and inject walk over tensors: units and cells.
//
// A unit is what one set of statistics can be finished from: an image (channels_last) or a group of an image (NCHW).
// A cell is a piece of a unit that has sums of its own: some pixels of all channels (channels_last), some channels of a
// group or some pixels of one (NCHW). Cells are cut by shape alone, so that no result depends on the number of threads.
// Inside a cell: group_norm_panel.h.
#pragma once

#include "group_norm.h"
#include "group_norm_vector.h"
#include "sizes.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

struct Walk {
    bool last;
    int64_t channels, x_channels, pixels, images, groups;
    int64_t group;                      // channels of a group
    int64_t step, pieces, span;         // pixels of a cell; cells that share a channel; channels of a cell
    int64_t units, cells, unit_groups;  // cells and groups of one unit
    int64_t padded;                     // columns of a unit, with room for whole vectors
    bool together;                      // an NCHW cell has one sum for all its channels
    int64_t kept;                       // columns that a cell has sums of
    int sums, numbers;                  // per column: doubles that a cell sums up, floats that transform a unit
    int threads;
    bool whole;  // each unit is done by one thread from beginning to end
};

// fewer floats than this are not worth waking a thread for
constexpr int64_t ALONE = 16384;

inline Walk walk(const Normed& in, int sums, int numbers, bool together = false) {
    Walk w{};
    // one pixel is both layouts; as channels_last its vectors are full
    w.last = in.channels_last || in.pixels == 1;
    w.channels = in.channels, w.x_channels = in.x_channels, w.pixels = in.pixels;
    w.images = in.images, w.groups = in.groups, w.group = in.channels / in.groups;
    // sums of 64 pixels or more, 32 pieces at most: their own traffic stays small beside the tensor's
    w.step = w.last ? larger(64, divided(divided(in.pixels, 32), 16) * 16) : 16384;
    w.pieces = divided(in.pixels, w.step);
    w.span = w.last ? in.channels : smaller(w.group, larger(1, w.step / larger(1, in.pixels)));
    w.units = w.last ? in.images : in.images * in.groups;
    w.cells = w.last ? w.pieces : divided(w.group, w.span) * w.pieces;
    w.unit_groups = w.last ? in.groups : 1;
    w.padded = divided(w.last ? in.channels : w.group, 16) * 16 + 16;
    w.together = together, w.kept = w.last ? w.padded : together ? 1 : w.span;
    w.sums = sums, w.numbers = numbers;
    const bool alone = in.images * in.channels * in.pixels <= ALONE;
    w.threads = alone ? 1 : (int)larger(1, smaller(in.threads, w.units * w.cells));
    // unequal shares cost more than the barriers between passes that all threads share
    w.whole = w.units >= 4 * w.threads || w.units % w.threads == 0;
    return w;
}

// what a unit's passes hand on to each other
struct Slot {
    double* sums;
    float* numbers;
};

inline int64_t sums_size(const Walk& w) { return w.cells * w.sums * w.kept; }

inline double* sums_of(const Walk& w, const Slot& slot, int64_t cell) { return slot.sums + cell * w.sums * w.kept; }

// One sum of a channel, over its cells in their order. Where sums are together: of the `span` channels that begin here.
inline double total(const Walk& w, const Slot& slot, int sum, int64_t column) {
    const int64_t block = column < w.span ? 0 : column / w.span;
    const double* p = sums_of(w, slot, block * w.pieces) + sum * w.kept + (column - block * w.span);
    double all = 0;
    for (int64_t piece = 0; piece < w.pieces; ++piece) all += p[piece * w.sums * w.kept];
    return all;
}

// body(thread, first, end) for each thread's share of `count`
template <typename Body>
inline void share(int threads, int64_t count, const Body& body) {
    // the runtime takes its locks for one thread too
    if (threads == 1) return body(0, 0, count);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; ++thread)
        body(thread, count * thread / threads, count * (thread + 1) / threads);
}

// A cell, or in passes over groups a group.
struct Place {
    int64_t image, group;
    int64_t cell, column, piece;  // number within the unit, first column, piece of its channels
};

// A pass of a kernel over the cells or over the groups of a unit: body(place, slot).
enum Over { CELLS, CELLS_FROM_THE_LAST, GROUPS };

template <Over OVER, typename Body>
struct Pass {
    const Body& body;

    static int64_t count(const Walk& w) { return OVER == GROUPS ? w.unit_groups : w.cells; }

    // numbers `first` to `end` within one unit
    void operator()(const Walk& w, int64_t unit, int64_t first, int64_t end, const Slot& slot) const {
        Place place{w.last ? unit : unit / w.groups, w.last ? 0 : unit % w.groups, 0, 0, 0};
        for (int64_t done = first; done < end; ++done) {
            // what the pass before touched last is still near
            const int64_t i = OVER == CELLS_FROM_THE_LAST ? first + end - 1 - done : done;
            if (OVER == GROUPS && w.last) place.group = i;
            if (OVER != GROUPS) {
                place.cell = i;
                const int64_t block = w.last ? 0 : w.pieces == 1 ? i : i / w.pieces;
                place.column = block * w.span, place.piece = i - block * w.pieces;
            }
            body(place, slot);
        }
    }

    // numbers `first` to `end` of all units
    template <typename SlotOf>
    void all(const Walk& w, int64_t first, int64_t end, const SlotOf& slot_of) const {
        if (first == end) return;
        const int64_t low = first / count(w), high = (end - 1) / count(w);
        for (int64_t done = low; done <= high; ++done) {
            const int64_t unit = OVER == CELLS_FROM_THE_LAST ? low + high - done : done, origin = unit * count(w);
            (*this)(w, unit, larger(first - origin, 0), smaller(end - origin, count(w)), slot_of(unit));
        }
    }
};

template <typename Body>
inline Pass<CELLS, Body> cells(const Body& body) {
    return {body};
}

template <typename Body>
inline Pass<CELLS_FROM_THE_LAST, Body> cells_from_the_last(const Body& body) {
    return {body};
}

template <typename Body>
inline Pass<GROUPS, Body> groups(const Body& body) {
    return {body};
}

// The passes in turn, each on all of the tensor or on what one thread holds; false when there is no memory.
template <typename... Passes>
inline bool run(const Walk& w, const Passes&... passes) {
    const int64_t slots = w.whole ? w.threads : w.units;
    const int64_t doubles = divided(sums_size(w), 8) * 8, floats = divided(w.numbers * w.padded, 16) * 16;
    const int64_t bytes = doubles * (int64_t)sizeof(double) + floats * (int64_t)sizeof(float);
    void* room = __builtin_malloc((size_t)(slots * bytes + 64));
    if (!room) return false;
    char* memory = (char*)(((uintptr_t)room + 63) / 64 * 64);
    const auto slot = [&](int64_t i) {
        return Slot{(double*)(memory + i * bytes), (float*)(memory + i * bytes + doubles * (int64_t)sizeof(double))};
    };
    if (w.whole)
        share(w.threads, w.units, [&](int thread, int64_t first, int64_t end) {
            for (int64_t unit = first; unit < end; ++unit) (passes(w, unit, 0, passes.count(w), slot(thread)), ...);
        });
    else
        (share(w.threads, w.units * passes.count(w),
               [&](int, int64_t first, int64_t end) { passes.all(w, first, end, slot); }),
         ...);
    __builtin_free(room);
    return true;
}

inline double at(const PerChannel& v, int64_t n, int64_t c, double missing) {
    return v.data ? (double)v.data[n * v.image + c] : missing;
}

// calls the kernel for the dtype of what is normed
template <template <typename, bool> class Kernel, typename Call>
inline bool for_dtype(const Call& call) {
    const bool act = call.in.act;
    if (call.in.dtype == BFLOAT16) return act ? Kernel<Bfloat16, true>::run(call) : Kernel<Bfloat16, false>::run(call);
    if (call.in.dtype == FLOAT16) return act ? Kernel<Float16, true>::run(call) : Kernel<Float16, false>::run(call);
    return act ? Kernel<float, true>::run(call) : Kernel<float, false>::run(call);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
