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
    int64_t most;           // pixels of these

    explicit Lines(const Conv& call) {
        height = result_size(call, call.in.height), width = result_size(call, call.in.width);
        span = call.kind == STRIDED ? larger(1, PART_PIXELS / larger(width, 1)) * width : PART_PIXELS;
        const int64_t all = height * width, some = smaller(span, all);
        each = divided(all, larger(span, 1)), chunks = call.in.images * each;
        part = larger(1, PART_PIXELS / larger(1, some)), most = part * some;
    }

    // pixels of the result before chunk i
    int64_t before(int64_t i) const { return i / each * height * width + i % each * span; }
    int64_t pixels(int64_t i) const { return smaller(span, height * width - i % each * span); }
};

struct LineRoom {
    Front front;
    int64_t own, own_a, bytes;  // floats of one thread, which begin behind `front`; of its normed pixels; bytes of all

    LineRoom(const Conv& call, const Lines& p, int threads) : front(call, p.chunks) {
        own_a = call.in.groups ? padded(p.most * call.in.channels) : 0;
        own = own_a + padded(p.most * PANEL);
        bytes = front.end + threads * own * 4;
    }
};

// m (pixels, 32) of a chunk, tap by tap
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
                    call.stride * in.channels, end - begin, weight + tap * PANEL, 9 * PANEL, in.channels,
                    m + (line * plan.width + begin) * PANEL, true, columns);
        }
}

// z of `count` pixels from pixel `first` of image n on
inline void norm(const Conv& call, const Numbers& numbers, int64_t n, int64_t first, int64_t count, float* out) {
    for (int64_t i = 0; i < lanes_of(call.in); ++i) {
        Reader reader{call.in, lane_of(call.in, i), {}, {}, {}};
        reader.begin(numbers, n);
        reader.put(n, first, count, out + reader.lane.channel, call.in.channels);
    }
}

// m (pixels, 32) = z w of `count` pixels from pixel `first` of all on; w: one panel of a 1x1 convolution's weights, the
// rows of which are `next` apart. normed: z, where there is a norm
inline void multiply(const Conv& call, const float* normed, int64_t first, int64_t count, const float* weight,
                     int64_t next, float* m, int64_t columns, int64_t line = PANEL) {
    const Maps& in = call.in;
    const int64_t second = in.channels - in.x_channels;
    if (normed) return product(normed, in.channels, count, weight, next, in.channels, m, false, columns, line);
    product(in.x + first * in.x_channels, in.x_channels, count, weight, next, in.x_channels, m, false, columns, line);
    if (second)
        product(in.x2 + first * second, second, count, weight + in.x_channels * next, next, second, m, true, columns,
                line);
}

// y of one chunk from its products m, LANES channels of it, and their moments
inline void put(const Conv& call, const Lines& plan, int64_t chunk, int64_t channel, const float* m, double* partial) {
    Writer writer(call.out, chunk / plan.each, channel, partial);
    const int64_t first = plan.before(chunk);
    for (int64_t i = 0; i < plan.pixels(chunk); ++i) writer.put(first + i, load(m + i * PANEL) + writer.base);
    writer.finish();
}

inline void convolve_lines(const Conv& call, const Lines& plan, const LineRoom& room, char* memory,
                           const Team& team) {
    const Numbers numbers = room.front.numbers(call, memory, team);
    double* partial = room.front.moments(call, memory);
    float *normed = (float*)(memory + room.front.end) + team.thread * room.own, *m = normed + room.own_a;
    const int64_t panels = divided(call.out.channels, PANEL), depth = call.in.channels;
    team.share(divided(plan.chunks, plan.part), panels, [&](int64_t part, int64_t panel, int64_t end) {
        const int64_t begin = part * plan.part, last = smaller(begin + plan.part, plan.chunks) - 1;
        const int64_t first = plan.before(begin), pixels = plan.before(last) + plan.pixels(last) - first;
        for (int64_t i = begin; numbers.data && i <= last; ++i)
            norm(call, numbers, i / plan.each, i % plan.each * plan.span, plan.pixels(i),
                 normed + (plan.before(i) - first) * depth);
        // whoever begins with the first panel
        for (int64_t i = 0; call.append && !panel && i < pixels; ++i)
            __builtin_memcpy(call.out.y + (first + i) * call.out.apart + call.out.channels, normed + i * depth,
                             (size_t)depth * 4);
        for (; panel < end; ++panel) {
            const int64_t channel = panel * PANEL, columns = smaller(PANEL, call.out.channels - channel);
            if (call.kind == POINTWISE)
                multiply(call, numbers.data ? normed : nullptr, first, pixels, call.weight + panel * depth * PANEL,
                         PANEL, m, columns);
            else
                for (int64_t i = begin; i <= last; ++i)
                    taps(call, plan, i, call.weight + panel * 9 * depth * PANEL, m + (plan.before(i) - first) * PANEL,
                         columns);
            for (int64_t i = begin; i <= last; ++i)
                for (int64_t c = 0; c < columns; c += LANES)
                    put(call, plan, i, channel + c, m + (plan.before(i) - first) * PANEL + c,
                        partial ? partial + i * call.out.channels * 2 : nullptr);
        }
    });
    join(call.out, call.in.images, plan, plan.each, partial, team);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
