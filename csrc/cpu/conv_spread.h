// 3x3 convolutions to a few outputs, as a network's last one: every pixel is multiplied with the weights of all nine taps at
// once, which then fill the vectors, and a pixel of the result is the sum of nine of these numbers.
#pragma once

#include "conv_rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// Measured on Zen 4, 128 inputs, 32x32: for 1 to 3 outputs 2.2 times as fast as in tiles, for 6 1.2 times, for 8 0.8 times.
constexpr int64_t FEW_OUTPUTS = 7;
constexpr int64_t SPREAD_PIXELS = 1024;

// A chunk is some lines of one image of the result.
struct Spread {
    int64_t height, width;  // of the result
    int64_t lines, each;    // of a chunk; chunks of an image
    int64_t chunks;         // of all
    int64_t columns, line;  // of the products of a pixel, in whole panels
    int64_t most;           // lines that a chunk reads

    explicit Spread(const Conv& call) {
        height = result_size(call, call.in.height), width = result_size(call, call.in.width);
        // the lines around a chunk are multiplied again: a quarter of an image, for its threads, or as many as fit
        lines = larger(1, smaller(divided(height, 4), SPREAD_PIXELS / larger(1, call.in.width)));
        each = divided(height, lines), chunks = call.in.images * each;
        columns = 9 * call.out.channels, line = divided(columns, PANEL) * PANEL;
        most = call.kind == UPSAMPLED ? lines / 2 + 3 : (lines - 1) * call.stride + 3;
    }

    int64_t pixels(int64_t i) const { return smaller(lines, height - i % each * lines) * width; }
};

// The line or column that tap 0, 1 or 2 meets from line or column i of the result; -1 or `size` and more: outside.
inline int64_t met(const Conv& call, int64_t i, int64_t tap) {
    if (call.kind != UPSAMPLED) return i * call.stride + tap - call.before;
    return i + tap - 1 < 0 ? -1 : (i + tap - 1) / 2;
}

struct SpreadRoom {
    Front front;
    int64_t own, own_a, own_b, bytes;  // floats of one thread; of its normed pixels; of its weights; bytes of all

    SpreadRoom(const Conv& call, const Spread& p, int threads) : front(call, p.chunks) {
        const int64_t pixels = p.most * call.in.width;
        own_a = call.in.groups ? padded(pixels * call.in.channels) : 0;
        own_b = padded(call.in.channels * p.line);
        own = own_a + own_b + padded(pixels * p.line + LANES);
        bytes = front.end + threads * own * 4;
    }
};

// b (C, line): the weights of all taps of a channel side by side, those of one tap one behind the other
inline void spread_weights(const Conv& call, const Spread& plan, float* b) {
    const int64_t outputs = call.out.channels;
    for (int64_t c = 0; c < call.in.channels; ++c, b += plan.line) {
        for (int64_t i = plan.columns; i < plan.line; ++i) b[i] = 0;
        for (int64_t tap = 0; tap < 9; ++tap)
            for (int64_t o = 0; o < outputs; ++o) b[tap * outputs + o] = call.weight[(c * 9 + tap) * PANEL + o];
    }
}

// y of a chunk from the products m of the lines from `top` on, LANES channels of it, and their moments
inline void sum_up(const Conv& call, const Spread& plan, int64_t chunk, int64_t top, int64_t channel, const float* m,
                   double* partial) {
    const int64_t n = chunk / plan.each, first = chunk % plan.each * plan.lines, width = call.in.width;
    Writer writer(call.out, n, channel, partial);
    for (int64_t i = 0; i < plan.pixels(chunk); ++i) {
        const int64_t line = first + i / plan.width, column = i % plan.width;
        F32 v = writer.base;
        for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t y = met(call, line, tap / 3), x = met(call, column, tap % 3);
            if (y < 0 || y >= call.in.height || x < 0 || x >= width) continue;
            v += load(m + ((y - top) * width + x) * plan.line + tap * call.out.channels + channel);
        }
        writer.put((n * plan.height + line) * plan.width + column, v);
    }
    writer.finish();
}

inline void convolve_spread(const Conv& call, const Spread& plan, const SpreadRoom& room, char* memory,
                            const Team& team) {
    const Maps& in = call.in;
    const Numbers numbers = room.front.numbers(call, memory, team);
    double* partial = room.front.moments(call, memory);
    float* normed = (float*)(memory + room.front.end) + team.thread * room.own;
    float *b = normed + room.own_a, *m = b + room.own_b;
    spread_weights(call, plan, b);
    team.share(plan.chunks, 1, [&](int64_t chunk, int64_t, int64_t) {
        const int64_t n = chunk / plan.each, first = chunk % plan.each * plan.lines;
        const int64_t last = smaller(first + plan.lines, plan.height) - 1;
        const int64_t top = larger(0, met(call, first, 0)), end = smaller(in.height, met(call, last, 2) + 1);
        const int64_t at = top * in.width, pixels = (end - top) * in.width;
        if (numbers.data) norm(call, numbers, n, at, pixels, normed);
        for (int64_t column = 0; column < plan.columns; column += PANEL)
            multiply(call, numbers.data ? normed : nullptr, n * in.height * in.width + at, pixels, b + column, plan.line,
                     m + column, smaller(PANEL, plan.columns - column), plan.line);
        for (int64_t c = 0; c < call.out.channels; c += LANES)
            sum_up(call, plan, chunk, top, c, m, partial ? partial + chunk * call.out.channels * 2 : nullptr);
    });
    join(call.out, call.in.images, plan, plan.each, partial, team);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
