// What lies within a cell of group_norm_walk.h: panels, and in them blocks.
//
// A panel is the part of a cell that lies in one tensor, as rows of vectors; a block is a few rows of one column of
// vectors. Where the channels are last rows are pixels and columns channels; else a row is as many pixels of one
// channel as a vector has lanes, and there is one column.
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

// the compiler would rather call what a loop does
#define FASTDIFF_INLINE __attribute__((always_inline))

// body(panel) for the panels of a cell
template <typename Body>
FASTDIFF_INLINE inline void panels(const Walk& w, const Place& place, const Body& body) {
    const int64_t p = place.piece * w.step, count = smaller(w.step, w.pixels - p), n = place.image;
    const int64_t x2_channels = w.channels - w.x_channels;
    if (!w.last) {
        const int64_t c = place.group * w.group + place.column;
        const bool second = c >= w.x_channels;
        const int64_t row = second ? n * x2_channels + c - w.x_channels : n * w.x_channels + c;
        const int64_t x = row * w.pixels + p, joined = (n * w.channels + c) * w.pixels + p;
        return body(Panel{second, x, joined, LANES, LANES, count / LANES, LANES, 0, (int)(count % LANES)});
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
    F32 read(const T* p) const {
        return WHOLE ? load(p) : load(p, lanes);
    }
    // zero in the lanes that are not there
    F32 within(F32 v) const { return WHOLE ? v : first_of(v, lanes); }
    template <typename T>
    void write(T* p, F32 v) const {
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

// the sums of a cell, a vector for each column
struct Sums {
    double* first;
    int64_t apart;

    double* of(int sum, int64_t column) const { return first + sum * apart + column; }
};

// body(sums) from zero, for the sums of a cell
template <int SUMS, typename Body>
FASTDIFF_INLINE inline void summed(const Walk& w, const Place& place, const Slot& slot, const Body& body) {
    double* out = sums_of(w, slot, place.cell);
    if (w.last) __builtin_memset(out, 0, (size_t)(SUMS * w.padded) * sizeof(double));
    alignas(64) double room[SUMS * LANES] = {};
    body(w.last ? Sums{out, w.padded} : Sums{room, LANES});
    if (w.last) return;
    for (int sum = 0; sum < SUMS; ++sum)
        out[sum] = added(load(room + sum * LANES) + load(room + sum * LANES + LANES / 2));
}

// the numbers of a cell's channels, a vector for each column
struct Numbers {
    const float* first;
    int64_t apart;
    bool last;

    Numbers(const Walk& w, const Place& place, const Slot& slot)
        : first(slot.numbers + place.column), apart(w.padded), last(w.last) {}

    F32 of(int number, int64_t column) const {
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
