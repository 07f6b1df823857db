// What the kernels of conv.cpp read and write: pixels of LANES channels, normed on the way in, summed up on the way out.
#pragma once

#include "conv.h"
#include "group_norm_vector.h"
#include "sizes.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// z = (x - center) slope + offset, by image and channel; slope and offset carry MINUS_LOG2_E where a SiLU follows
struct Numbers {
    float* data;  // (N, 3, C), null without a norm
    int64_t channels;

    float* of(int64_t image, int which) const { return data + (image * 3 + which) * channels; }
};

enum { CENTER, SLOPE, OFFSET };

inline const double* moments_of(const Maps& in, int64_t n, int64_t c) {
    const int64_t second = in.channels - in.x_channels;
    return c < in.x_channels ? in.moments + (n * in.x_channels + c) * 2
                             : in.moments2 + (n * second + c - in.x_channels) * 2;
}

inline double number_of(const PerChannel& v, int64_t n, int64_t c, double missing) {
    return v.data ? (double)v.data[n * v.image + c] : missing;
}

// Numbers of one image from the moments of its channels: those of a group are their means, and what the channels' own
// means add to the spread.
inline void prepare(const Maps& in, const Numbers& numbers, int64_t n) {
    const int64_t group = in.channels / in.groups;
    const double unit = in.act ? (double)MINUS_LOG2_E : 1.0;
    for (int64_t first = 0; first < in.channels; first += group) {
        double mean = 0, variance = 0;
        for (int64_t c = first; c < first + group; ++c) mean += moments_of(in, n, c)[0] / (double)group;
        for (int64_t c = first; c < first + group; ++c) {
            const double *m = moments_of(in, n, c), off = m[0] - mean;
            variance += (m[1] + off * off) / (double)group;
        }
        const double rstd = 1 / __builtin_sqrt(variance + in.eps);
        for (int64_t c = first; c < first + group; ++c) {
            const double scale = 1 + number_of(in.scale, n, c, 0);
            const double slope = number_of(in.weight, 0, c, 1) * rstd * scale;
            const double offset = number_of(in.bias, 0, c, 0) * scale + number_of(in.shift, n, c, 0);
            const float center = (float)mean;
            numbers.of(n, CENTER)[c] = center;
            numbers.of(n, SLOPE)[c] = (float)(slope * unit);
            numbers.of(n, OFFSET)[c] = (float)((offset - (mean - (double)center) * slope) * unit);
        }
    }
}

// LANES channels of the maps, or the last few of x or of x2
struct Lane {
    const float* first;  // of pixel 0 of image 0
    int64_t stride;      // channels of the tensor that they lie in
    int64_t channel;     // in cat([x, x2])
    int count;
};

inline int64_t lanes_of(const Maps& in) {
    return divided(in.x_channels, LANES) + divided(in.channels - in.x_channels, LANES);
}

inline Lane lane_of(const Maps& in, int64_t i) {
    const int64_t before = divided(in.x_channels, LANES), second = in.channels - in.x_channels;
    if (i < before)
        return {in.x + i * LANES, in.x_channels, i * LANES, (int)smaller(LANES, in.x_channels - i * LANES)};
    const int64_t c = (i - before) * LANES;
    return {in.x2 + c, second, in.x_channels + c, (int)smaller(LANES, second - c)};
}

FASTDIFF_INLINE inline F32 read(const float* p, int count) { return count == LANES ? load(p) : load(p, count); }

FASTDIFF_INLINE inline void write(float* p, F32 v, int count) {
    if (count == LANES)
        store(p, v);
    else
        store(p, v, count);
}

// z at `count` pixels from pixel `first` of image n on, each TIMES times
struct Reader {
    const Maps& in;
    Lane lane;
    F32 center, slope, offset;

    void begin(const Numbers& numbers, int64_t n) {
        if (!numbers.data) return;
        center = read(numbers.of(n, CENTER) + lane.channel, lane.count);
        slope = read(numbers.of(n, SLOPE) + lane.channel, lane.count);
        offset = read(numbers.of(n, OFFSET) + lane.channel, lane.count);
    }

    template <int ROWS, bool NORM, bool ACT, int TIMES, bool WHOLE>
    FASTDIFF_INLINE void some(const float* from, float* out) const {
        F32 z[ROWS];
        // the next lane of each pixel, which is a line of the cache further on
        FASTDIFF_ROWS __builtin_prefetch(from + r * lane.stride + LANES);
        FASTDIFF_ROWS z[r] = read(from + r * lane.stride, WHOLE ? LANES : lane.count);
        if (NORM) FASTDIFF_ROWS z[r] = multiply_add(z[r] - center, slope, offset);
        if (NORM && ACT) silu(z);
        FASTDIFF_ROWS for (int i = 0; i < TIMES; ++i) store(out + (TIMES * r + i) * LANES, z[r]);
    }

    template <bool NORM, bool ACT, int TIMES, bool WHOLE>
    void run(const float* from, int64_t count, float* out) const {
        const int64_t next = lane.stride, repeated = TIMES * LANES;
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) some<4, NORM, ACT, TIMES, WHOLE>(from + i * next, out + i * repeated);
        for (; i < count; ++i) some<1, NORM, ACT, TIMES, WHOLE>(from + i * next, out + i * repeated);
    }

    template <bool NORM, bool ACT, int TIMES>
    void all(const float* from, int64_t count, float* out) const {
        if (lane.count == LANES)
            run<NORM, ACT, TIMES, true>(from, count, out);
        else
            run<NORM, ACT, TIMES, false>(from, count, out);
    }

    template <int TIMES>
    void repeated(int64_t n, int64_t first, int64_t count, float* out) const {
        const float* from = lane.first + (n * in.height * in.width + first) * lane.stride;
        if (!in.groups) return all<false, false, TIMES>(from, count, out);
        if (!in.act) return all<true, false, TIMES>(from, count, out);
        all<true, true, TIMES>(from, count, out);
    }

    // whole vectors: what lies behind the channels that there are is written too
    void operator()(int64_t n, int64_t first, int64_t count, float* out) const { repeated<1>(n, first, count, out); }
    void twice(int64_t n, int64_t first, int64_t count, float* out) const { repeated<2>(n, first, count, out); }

    // `step` floats apart, and nothing behind the channels that there are
    void put(int64_t n, int64_t first, int64_t count, float* out, int64_t step) const {
        constexpr int64_t FEW = 16;
        float room[FEW * LANES];
        for (int64_t done = 0; done < count; done += FEW) {
            const int64_t some = smaller(FEW, count - done);
            (*this)(n, first + done, some, room);
            for (int64_t i = 0; i < some; ++i) write(out + (done + i) * step, load(room + i * LANES), lane.count);
        }
    }
};

// Sum and squares of what is written, about the first number of each channel: what they lose is lost at no mean / std.
struct Moments {
    F32 pivot{}, sum{}, squares{};
    int64_t count = 0;

    FASTDIFF_INLINE void add(F32 v) {
        if (!count) pivot = v;
        const F32 off = v - pivot;
        sum += off, squares = multiply_add(off, off, squares);
        ++count;
    }

    // mean and variance of each of the lanes, to out (LANES, 2)
    void finish(double* out, int lanes) const {
        float p[LANES], s[LANES], q[LANES];
        store(p, pivot), store(s, sum), store(q, squares);
        for (int l = 0; l < lanes; ++l) {
            const double mean = (double)s[l] / (double)count;
            out[2 * l] = (double)p[l] + mean;
            out[2 * l + 1] = positive((double)q[l] / (double)count - mean * mean);
        }
    }

    // NaN stays
    static double positive(double v) { return v < 0 ? 0 : v; }
};

// Puts the moments (channels, 2) of `count` pixels to those of `before` pixels, which are nothing where before is 0.
inline void merge(double* all, double before, const double* part, double count, int64_t channels) {
    const double share = count / (before + count);
    for (int64_t c = 0; c < channels; ++c) {
        if (before == 0) all[2 * c] = part[2 * c], all[2 * c + 1] = part[2 * c + 1];
        const double off = part[2 * c] - all[2 * c], wider = part[2 * c + 1] - all[2 * c + 1];
        all[2 * c] += share * off;
        all[2 * c + 1] += share * (wider + (1 - share) * off * off);
    }
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
