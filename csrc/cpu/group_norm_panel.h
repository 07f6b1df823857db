// What lies within a cell of group_norm_walk.h: panels, and in them blocks.
//
// A panel is the part of a cell that lies in one tensor, as rows of vectors; a block is a few rows of one column of
// vectors. Where the channels are last rows are pixels and columns channels; else a panel is one channel (merged: all
// that lie behind each other), a row as many pixels as a vector has lanes, and there is one column.
#pragma once

#include "group_norm_walk.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

struct Panel {
    bool second;        // part of x2
    int64_t x, joined;  // where it begins in its own tensor and in one of all channels
    int64_t x_stride, joined_stride;
    int64_t rows, width, column;
    int rest;  // lanes of a row behind the others that is no whole vector
};

// body(panel) for the panels of a cell
template <typename Body>
FASTDIFF_INLINE inline void panels(const Walk& w, const Place& place, bool merged, const Body& body) {
    const int64_t p = place.piece * w.step, count = smaller(w.step, w.pixels - p), n = place.image;
    const int64_t x2_channels = w.channels - w.x_channels;
    if (!w.last) {
        const int64_t first = place.group * w.group, end = first + smaller(place.column + w.span, w.group);
        for (int64_t c = first + place.column, next; c < end; c = next) {
            const bool second = c >= w.x_channels;
            next = !merged ? c + 1 : second ? end : smaller(end, w.x_channels);
            const int64_t row = second ? n * x2_channels + c - w.x_channels : n * w.x_channels + c;
            const int64_t joined = (n * w.channels + c) * w.pixels + p, all = (next - c) * count;
            const int rest = (int)(all % LANES);
            body(Panel{second, row * w.pixels + p, joined, LANES, LANES, all / LANES, LANES, c - first, rest});
        }
        return;
    }
    const int64_t pixel = n * w.pixels + p, all = pixel * w.channels;
    for (int part = 0; part < (x2_channels ? 2 : 1); ++part) {
        const int64_t own = part ? x2_channels : w.x_channels, column = part ? w.x_channels : 0;
        body(Panel{part != 0, pixel * own, all + column, own, w.channels, count, own, column, 0});
    }
}

template <int ROWS, bool WHOLE>
struct Block {
    static constexpr int rows = ROWS;
    int64_t row, column;
    int lanes;

    template <typename T>
    FASTDIFF_INLINE F32 read(const T* p) const {
        return WHOLE ? load(p) : load(p, lanes);
    }
    // Asks for the rows behind these. The columns of a whole row ask in the order of addresses, which is faster than
    // what the hardware makes of so many rows side by side; it needs no help where rows are vectors.
    template <bool WRITTEN = false, typename T>
    FASTDIFF_INLINE void fetch_next(const T* x, int64_t stride, int64_t width) const {
        if (stride == LANES) return;
        const bool dense = stride == width;
        const T* next = x + (row + ROWS) * stride + (dense ? ROWS * column : column);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next + r * (dense ? LANES : stride), WRITTEN);
    }
    // zero in the lanes that are not there
    F32 within(F32 v) const { return WHOLE ? v : first_of(v, lanes); }
    template <typename T>
    FASTDIFF_INLINE void write(T* p, F32 v) const {
        if (WHOLE)
            store(p, v);
        else
            store(p, v, lanes);
    }
};

template <int ROWS, typename Body>
FASTDIFF_INLINE inline void columns(int64_t row, int64_t width, const Body& body) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) body(Block<ROWS, true>{row, j, LANES});
    if (j < width) body(Block<ROWS, false>{row, j, (int)(width - j)});
}

// body(block) for the blocks of a panel, of ROWS rows while there are as many
template <int ROWS, typename Body>
FASTDIFF_INLINE inline void blocks(const Panel& panel, const Body& body) {
    int64_t row = 0;
    for (; row + ROWS <= panel.rows; row += ROWS) columns<ROWS>(row, panel.width, body);
    if (ROWS > 4)
        for (; row + 4 <= panel.rows; row += 4) columns<4>(row, panel.width, body);
    for (; row < panel.rows; ++row) columns<1>(row, panel.width, body);
    if (panel.rest) body(Block<1, false>{row, 0, panel.rest});
}

// body(run, rows) for the parts of a panel of at most so many rows and columns; what is no whole row is one more
template <typename Body>
FASTDIFF_INLINE inline void runs(const Panel& panel, int64_t rows, int64_t width, const Body& body) {
    for (int64_t row = 0; row < panel.rows; row += rows)
        for (int64_t j = 0; j < panel.width; j += width) {
            Panel run = panel;
            run.x += row * panel.x_stride + j, run.joined += row * panel.joined_stride + j, run.column += j;
            run.rows = smaller(rows, panel.rows - row), run.width = smaller(width, panel.width - j), run.rest = 0;
            body(run, run.rows);
        }
    if (!panel.rest) return;
    Panel run = panel;
    run.x += panel.rows * panel.x_stride, run.joined += panel.rows * panel.joined_stride, run.rows = 0;
    body(run, 1);
}

// body(block) once for each column of a run
template <typename Body>
FASTDIFF_INLINE inline void once(const Panel& run, const Body& body) {
    if (run.rest) return body(Block<1, false>{0, 0, run.rest});
    columns<1>(0, run.width, body);
}

// the sums of a panel, a vector for each column
struct Sums {
    double* first;
    int64_t apart;

    double* of(int sum, int64_t column) const { return first + sum * apart + column; }
};

// body(panel, sums) for the panels of a cell, whose sums begin at zero
template <int SUMS, typename Body>
FASTDIFF_INLINE inline void summed(const Walk& w, const Place& place, const Slot& slot, bool merged, const Body& body) {
    double* out = sums_of(w, slot, place.cell);
    if (w.last) __builtin_memset(out, 0, (size_t)(SUMS * w.padded) * sizeof(double));
    alignas(64) double room[SUMS * LANES] = {};
    const auto keep = [&](int64_t column) {
        for (int sum = 0; sum < SUMS; ++sum) {
            double* own = room + sum * LANES;
            out[sum * w.kept + column] = added(load(own) + load(own + LANES / 2));
        }
    };
    panels(w, place, merged, [&](const Panel& panel) FASTDIFF_INLINE {
        body(panel, w.last ? Sums{out + panel.column, w.padded} : Sums{room, LANES});
        if (w.last || w.together) return;
        keep(panel.column - place.column);
        __builtin_memset(room, 0, sizeof room);
    });
    if (!w.last && w.together) keep(0);
}

// the numbers of a panel's channels, a vector for each column
struct Numbers {
    const float* first;
    int64_t apart;
    bool last;

    Numbers(const Walk& w, const Slot& slot, const Panel& panel)
        : first(slot.numbers + panel.column), apart(w.padded), last(w.last) {}

    FASTDIFF_INLINE F32 of(int number, int64_t column) const {
        const float* p = first + number * apart;
        return last ? load(p + column) : splat(*p);
    }
};

inline void add_to(double* sum, F32 v) {
    store(sum, load(sum) + first_half(v));
    store(sum + LANES / 2, load(sum + LANES / 2) + second_half(v));
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
