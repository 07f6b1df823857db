// Convolutions as matrix products on the maps as they lie: 1x1 ones, whose pixels are rows of a matrix, and 3x3 ones of any
// stride, tap by tap, where the pixels that a tap meets along a line of the result are such rows too.
#pragma once

#include "conv_parts.h"
#include "product.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

constexpr int64_t PART_PIXELS = 64;

// A chunk is some pixels of one image of the result, whole lines of it where taps are taken one by one.
struct Lines {
    int64_t height, width;  // of the result
    int64_t span, each;     // pixels of a chunk, chunks of an image
    int64_t chunks, part;   // of all, of those that are multiplied together

    explicit Lines(const Conv& call) {
        const bool taps = call.kind == STRIDED;
        // as much behind as in front, or one more where the image ends before the last window
        const auto size = [&](int64_t n) { return taps ? (n + 1 - 3 + (call.before ? 1 : 0)) / call.stride + 1 : n; };
        height = size(call.in.height), width = size(call.in.width);
        span = taps ? larger(1, PART_PIXELS / larger(width, 1)) * width : PART_PIXELS;
        const int64_t all = height * width;
        each = divided(all, larger(span, 1)), chunks = call.in.images * each;
        part = larger(1, PART_PIXELS / larger(1, smaller(span, all)));
    }

    // pixels of the result before chunk i
    int64_t before(int64_t i) const { return i / each * height * width + i % each * span; }
    int64_t pixels(int64_t i) const { return smaller(span, height * width - i % each * span); }
};

struct LineRoom {
    Front front;
    int64_t own, own_a, bytes;  // floats of one thread, which begin behind `front`; of its normed pixels; bytes of all

    LineRoom(const Conv& call, const Lines& p, int threads) : front(call, p.chunks) {
        const int64_t pixels = p.part * p.span;
        own_a = call.in.groups ? lines(pixels * call.in.channels) / 4 : 0;
        own = own_a + lines(pixels * PANEL) / 4;
        bytes = front.end + threads * own * 4;
    }
};

// m (pixels, 32) of a chunk of a 3x3 convolution, tap by tap
inline void taps(const Conv& call, const Lines& plan, int64_t chunk, const float* weight, float* m, int64_t columns) {
    const Maps& in = call.in;
    const int64_t n = chunk / plan.each, first = chunk % plan.each * plan.span / plan.width;
    const int64_t lines = plan.pixels(chunk) / plan.width;
    for (int64_t i = 0; i < lines * plan.width * PANEL; i += LANES) store(m + i, F32{});
    for (int64_t line = 0; line < lines; ++line)
        for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t y = (first + line) * call.stride + tap / 3 - call.before, right = tap % 3 - call.before;
            if (y < 0 || y >= in.height) continue;
            // pixels of the result whose x = pixel stride + right is in the image
            const int64_t begin = right < 0 ? divided(-right, call.stride) : 0;
            const int64_t end = smaller(plan.width, divided(in.width - right, call.stride));
            if (begin >= end) continue;
            product(in.x + ((n * in.height + y) * in.width + begin * call.stride + right) * in.channels,
                    call.stride * in.channels, end - begin, weight + tap * PANEL, 9 * PANEL,
                    in.channels, m + (line * plan.width + begin) * PANEL, true, columns);
        }
}

// y of one chunk from its products m, LANES channels of it, and their moments
inline void put(const Conv& call, const Lines& plan, int64_t chunk, int64_t channel, const float* m, double* partial) {
    const Sum& out = call.out;
    const int count = (int)smaller(LANES, out.channels - channel);
    const int64_t pixels = plan.pixels(chunk), first = plan.before(chunk) * out.channels + channel;
    F32 base = out.bias ? read(out.bias + channel, count) : F32{};
    if (out.add.data) base += read(out.add.data + chunk / plan.each * out.add.image + channel, count);
    Moments moments;
    for (int64_t i = 0; i < pixels; ++i) {
        const int64_t at = first + i * out.channels;
        F32 v = load(m + i * PANEL) + base;
        if (out.residual) v += read(out.residual + at, count);
        if (partial) moments.add(v);
        write(out.y + at, v, count);
    }
    if (partial) moments.finish(partial + 2 * channel, count);
}

inline void convolve_lines(const Conv& call, const Lines& plan, const LineRoom& room, char* memory,
                           const Team& team) {
    const Maps& in = call.in;
    const Numbers numbers = room.front.numbers(call, memory, team);
    double* partial = room.front.moments(call, memory);
    float *normed = (float*)(memory + room.front.end) + team.thread * room.own, *m = normed + room.own_a;
    const int64_t panels = divided(call.out.channels, PANEL), depth = in.channels, second = depth - in.x_channels;
    const int64_t tap_count = call.kind == STRIDED ? 9 : 1;
    team.share(divided(plan.chunks, plan.part), panels, [&](int64_t part, int64_t panel, int64_t end) {
        const int64_t begin = part * plan.part, chunks = smaller(plan.part, plan.chunks - begin);
        const int64_t first = plan.before(begin);
        const int64_t pixels = plan.before(begin + chunks - 1) + plan.pixels(begin + chunks - 1) - first;
        if (numbers.data)
            for (int64_t i = 0; i < lanes_of(in); ++i) {
                Reader reader{in, lane_of(in, i), {}, {}, {}};
                for (int64_t chunk = begin; chunk < begin + chunks; ++chunk) {
                    const int64_t n = chunk / plan.each;
                    reader.begin(numbers, n);
                    reader.put(n, plan.before(chunk) - n * plan.height * plan.width, plan.pixels(chunk),
                               normed + (plan.before(chunk) - first) * depth + reader.lane.channel, depth);
                }
            }
        for (; panel < end; ++panel) {
            const int64_t channel = panel * PANEL, columns = smaller(PANEL, call.out.channels - channel);
            const float* weight = call.weight + panel * tap_count * depth * PANEL;
            if (call.kind == STRIDED) {
                for (int64_t i = 0; i < chunks; ++i)
                    taps(call, plan, begin + i, weight, m + (plan.before(begin + i) - first) * PANEL, columns);
            } else if (numbers.data) {
                product(normed, depth, pixels, weight, PANEL, depth, m, false, columns);
            } else {
                product(in.x + first * in.x_channels, in.x_channels, pixels, weight, PANEL, in.x_channels, m, false,
                        columns);
                if (second)
                    product(in.x2 + first * second, second, pixels, weight + in.x_channels * PANEL, PANEL, second, m,
                            true, columns);
            }
            for (int64_t i = begin; i < begin + chunks; ++i)
                for (int64_t c = 0; c < columns; c += LANES)
                    put(call, plan, i, channel + c, m + (plan.before(i) - first) * PANEL + c,
                        partial ? partial + i * call.out.channels * 2 : nullptr);
        }
    });
    team.wait();
    if (partial) join(call, plan, plan.each, partial, team);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
