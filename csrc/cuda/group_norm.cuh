// What the group norm's kernels share: who does what, sums over a block, the numbers a channel is scaled with.
#pragma once

#include "device.cuh"
#include "launch.cuh"

namespace fastdiff {
namespace cuda {

constexpr int NORM_THREADS = 256;

struct Norm {
    GroupNorm call;
    Plan plan;
};

// 16 bytes of a tensor: `WIDE` channels of one pixel or `DEEP` pixels of one channel
template <typename T, int WIDE_, int DEEP_>
struct Vectors {
    static constexpr int WIDE = WIDE_, DEEP = DEEP_, SIZE = WIDE * DEEP;
    using Raw = uint4;
    FASTDIFF_DEVICE static Raw read(const void* data, Dtype, int64_t at) {
        return *reinterpret_cast<const uint4*>(static_cast<const T*>(data) + at);
    }
    FASTDIFF_DEVICE static void widened(const Raw& raw, float* v) { widen(raw, v, T{}); }
    FASTDIFF_DEVICE static void write(void* data, Dtype, int64_t at, const float* v) {
        *reinterpret_cast<uint4*>(static_cast<T*>(data) + at) = narrowed(v, T{});
    }
};

// number by number, any type
struct Numbers {
    static constexpr int WIDE = 1, DEEP = 1, SIZE = 1;
    using Raw = float;
    FASTDIFF_DEVICE static Raw read(const void* data, Dtype dtype, int64_t at) { return load(data, dtype, at); }
    FASTDIFF_DEVICE static void widened(Raw raw, float* v) { *v = raw; }
    FASTDIFF_DEVICE static void write(void* data, Dtype dtype, int64_t at, const float* v) {
        store(data, dtype, at, *v);
    }
};

template <typename Body>
void with_vectors(const GroupNorm& call, const Plan& plan, const Body& body) {
    if (!plan.vectors) return body(Numbers{});
    const bool wide = plan.wide > 1;
    if (call.dtype == FLOAT32) return wide ? body(Vectors<float, 4, 1>{}) : body(Vectors<float, 1, 4>{});
    if (call.dtype == BFLOAT16) return wide ? body(Vectors<Bfloat, 8, 1>{}) : body(Vectors<Bfloat, 1, 8>{});
    return wide ? body(Vectors<Half, 8, 1>{}) : body(Vectors<Half, 1, 8>{});
}

// this thread's share: channel.. of image n, every lanes-th vector of pixels in [first, last)
struct Place {
    int64_t n, first, last;
    int split, tile, channels, channel, column, lane;  // tile: its first channel, `channels`: how many it has
    bool active;

    FASTDIFF_DEVICE Place(const GroupNorm& call, const Plan& plan, uint32_t block) {
        const int wide = plan.columns * plan.wide, thread = (int)threadIdx.x;
        split = (int)(block % plan.splits), block /= plan.splits;
        tile = (int)(block % plan.tiles) * wide, n = block / plan.tiles;
        channels = call.channels - tile < wide ? (int)(call.channels - tile) : wide;
        column = call.channels_last ? thread % plan.columns : thread / plan.lanes;
        lane = call.channels_last ? thread / plan.columns : thread % plan.lanes;
        channel = tile + column * plan.wide;
        active = thread < plan.columns * plan.lanes && channel < call.channels;
        const int64_t all = call.pixels / plan.deep;
        first = split * plan.range, last = first + plan.range < all ? first + plan.range : all;
        if (first > last) first = last;
    }

    // vectors of this thread
    FASTDIFF_DEVICE int count(const Plan& plan) const {
        return active && first + lane < last ? (int)((last - first - lane + plan.lanes - 1) / plan.lanes) : 0;
    }
};

// where this thread finds its vectors in a tensor of `width` channels whose first one is channel `from` of the norm
struct Cursor {
    int64_t at, step;

    FASTDIFF_DEVICE Cursor(const GroupNorm& call, const Plan& plan, const Place& place, int64_t from, int64_t width) {
        const int64_t c = place.channel - from, p = (place.first + place.lane) * plan.deep;
        at = place.n * width * call.pixels + (call.channels_last ? p * width + c : c * call.pixels + p);
        step = (int64_t)plan.lanes * plan.deep * (call.channels_last ? width : 1);
    }
    FASTDIFF_DEVICE int64_t operator()(int j) const { return at + j * step; }
};

// the half of cat([x, x2], 1) that holds this thread's channels
struct Half2 {
    bool second;
    Cursor cursor;

    FASTDIFF_DEVICE Half2(const GroupNorm& call, const Plan& plan, const Place& place)
        : second(place.channel >= call.first),
          cursor(call, plan, place, second ? call.first : 0, second ? call.channels - call.first : call.first) {}
    template <typename P>
    FASTDIFF_DEVICE P* of(P* x, P* x2) const {
        return second ? x2 : x;
    }
};

// use(j, read(j)) for j < count; BATCH loads are on their way before the first is used
template <int BATCH, typename Raw, typename Read, typename Use>
FASTDIFF_DEVICE void walk(int count, const Read& read, const Use& use) {
    int j = 0;
    for (; j + BATCH <= count; j += BATCH) {
        Raw raw[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) raw[b] = read(j + b);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) use(j + b, raw[b]);
    }
#pragma unroll 1
    for (; j < count; ++j) use(j, read(j));
}

// Sums v over the lanes of a block in a fixed order; room[c K + k] then holds that of channel tile + c. Room for
// NORM_THREADS WIDE K floats; every thread of the block comes here.
template <int WIDE, int K>
FASTDIFF_DEVICE void sum_lanes(const Plan& plan, const Place& place, const float (&v)[WIDE * K], float* room) {
    const int width = plan.columns * WIDE * K, parts = plan.lanes < 8 ? plan.lanes : 8, thread = (int)threadIdx.x;
    __syncthreads();
    if (thread < plan.columns * plan.lanes) {
        float* mine = room + place.lane * width + place.column * WIDE * K;
#pragma unroll
        for (int i = 0; i < WIDE * K; ++i) mine[i] = v[i];
    }
    __syncthreads();
    for (int item = thread; item < width * parts; item += NORM_THREADS) {
        const int at = item % width, part = item / width;
        float sum = 0;
        for (int lane = part; lane < plan.lanes; lane += parts) sum += room[lane * width + at];
        room[item] = sum;
    }
    __syncthreads();
    for (int at = thread; at < width; at += NORM_THREADS) {
        float sum = 0;
        for (int part = 0; part < parts; ++part) sum += room[part * width + at];
        room[at] = sum;
    }
    __syncthreads();
}

// out[g K + k]: sums over the channels of each group of the tile, of value(channel of the tile, k)
template <int K, typename Value>
FASTDIFF_DEVICE void sum_groups(const Norm& norm, const Place& place, float* out, const Value& value) {
    const int size = (int)(norm.call.channels / norm.call.groups), lane = threadIdx.x % 32;
    for (int g = threadIdx.x / 32; g < place.channels / size; g += NORM_THREADS / 32)
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float sum = 0;
            for (int c = lane; c < size; c += 32) sum += value(g * size + c, k);
            sum = sum_of_warp(sum);
            if (lane == 0) out[g * K + k] = sum;
        }
    __syncthreads();
}

// vectors of pixels of a split
FASTDIFF_DEVICE int64_t length_of(const Norm& norm, int split) {
    const int64_t left = norm.call.pixels / norm.plan.deep - split * norm.plan.range;
    return left < 0 ? 0 : left < norm.plan.range ? left : norm.plan.range;
}

// a + b = sum + rest, exactly
struct Exact {
    float sum, rest;
};
FASTDIFF_DEVICE Exact exact_sum(float a, float b) {
    const float s = a + b, t = s - a;
    return {s, (a - (s - t)) + (b - t)};
}

// mean = hi + lo, sum of squared distances to it, and how many numbers
struct Moments {
    float hi, lo, m2, n;
};

// those of n numbers whose distances d to `pivot` have the sums a = sum d, b = sum d^2
FASTDIFF_DEVICE Moments moments(float pivot, float a, float b, float n) {
    const float mean = n > 0 ? a / n : 0;
    const Exact m = exact_sum(pivot, mean);
    // b - a mean is NaN where a number was; fmaxf would hide it
    const float m2 = b - a * mean;
    return {m.sum, m.rest, m2 < 0 ? 0 : m2, n};
}

// Chan 1979
FASTDIFF_DEVICE Moments merged(const Moments& a, const Moments& b) {
    if (b.n == 0) return a;
    if (a.n == 0) return b;
    const float n = a.n + b.n, share = b.n / n, delta = (b.hi - a.hi) + (b.lo - a.lo);
    const Exact m = exact_sum(a.hi, a.lo + delta * share);
    return {m.sum, m.rest, a.m2 + b.m2 + delta * delta * share * a.n, n};
}

FASTDIFF_DEVICE float at(const PerChannel& v, int64_t n, int64_t c, float absent) {
    return v.data ? v.data[n * v.image + c] : absent;
}

// y = silu(A (x - M) + B); xhat = r (x - M) + d; w = weight (1 + scale)
struct Channel {
    float A, M, B, r, d, w;
};

FASTDIFF_DEVICE Channel channel_of(const GroupNorm& call, int64_t n, int64_t c, float hi, float lo, float rstd) {
    const float add = at(call.add, n, c, 0), factor = 1 + at(call.scale, n, c, 0), weight = at(call.weight, n, c, 1);
    const Exact s = exact_sum(hi, -add);
    const float rest = s.rest + lo, M = s.sum + rest, off = (M - s.sum) - rest;  // M = mean - add + off
    const float bias = at(call.bias, n, c, 0) + weight * rstd * off;
    return {rstd * weight * factor, M, bias * factor + at(call.shift, n, c, 0), rstd, rstd * off, weight * factor};
}

FASTDIFF_DEVICE float silu(float n) { return n * reciprocal_fast(1 + exp2_fast(n * -1.44269504f)); }
FASTDIFF_DEVICE float silu_slope(float n) {
    const float s = reciprocal_fast(1 + exp2_fast(n * -1.44269504f));
    return s * fused(n, 1 - s, 1.0f);
}

// A, M, B, and in the backward dz = A dn - U (x - M) - T; as they lie in the workspace and in shared memory
struct Scales {
    float A, M, B, U, T, none[3];
};

// of the injection alone: (x + add) (1 + scale) + shift
FASTDIFF_DEVICE Scales injection_scales(const GroupNorm& call, int64_t n, int64_t c) {
    return {1 + at(call.scale, n, c, 0), -at(call.add, n, c, 0), at(call.shift, n, c, 0), 0, 0, {}};
}

// the scales of this thread's channels, from the table of its image or tile
template <int WIDE>
struct Owned {
    float A[WIDE], M[WIDE], B[WIDE];

    FASTDIFF_DEVICE explicit Owned(const Scales* s) {
#pragma unroll
        for (int w = 0; w < WIDE; ++w) A[w] = s[w].A, M[w] = s[w].M, B[w] = s[w].B;
    }
};

// y of one vector
template <typename V>
FASTDIFF_DEVICE void scaled(const GroupNorm& call, const Owned<V::WIDE>& own, float (&v)[V::SIZE]) {
#pragma unroll
    for (int e = 0; e < V::SIZE; ++e) {
        const int w = V::WIDE > 1 ? e : 0;
        v[e] = fused(own.A[w], v[e] - own.M[w], own.B[w]);
        if (call.act) v[e] = silu(v[e]);
    }
}

// floats of the workspace: scales (N, C), then partial sums (N, splits, C, 4)
FASTDIFF_DEVICE Scales* scales_of(const GroupNorm& call, int64_t n) {
    return reinterpret_cast<Scales*>(call.workspace) + n * call.channels;
}
FASTDIFF_DEVICE float4* partials_of(const Norm& norm, int64_t n, int64_t split) {
    const GroupNorm& call = norm.call;
    float4* all = reinterpret_cast<float4*>(reinterpret_cast<Scales*>(call.workspace) + call.images * call.channels);
    return all + (n * norm.plan.splits + split) * call.channels;
}

inline int64_t blocks_of(const Norm& norm) {
    return norm.call.images * norm.plan.tiles * norm.plan.splits;
}

// Shared memory of a block: room for sum_lanes, the tile's scales, what a cluster exchanges, and the tile itself.
struct Rooms {
    int scales, exchange, tile, all;  // where each begins, in bytes; sum_lanes' is at 0
};

FASTDIFF_DEVICE_AND_HOST Rooms rooms_of(const Plan& plan, int tensors) {
    Rooms r;
    const int channels = plan.columns * plan.wide, vector = plan.vectors ? 16 : 4;
    r.scales = plan.columns * plan.lanes * plan.wide * 2 * 4;
    r.scales = (r.scales + 15) / 16 * 16;
    r.exchange = r.scales + channels * (int)sizeof(Scales);
    r.tile = r.exchange + (channels * 6 * 4 + 15) / 16 * 16;
    r.all = r.tile;
    if (plan.one_pass) {
        const int64_t each = (plan.range + plan.lanes - 1) / plan.lanes;
        // what does not fit must not wrap around to something that does
        const int64_t bytes = each * plan.columns * plan.lanes * vector * tensors;
        r.all = bytes > (1 << 28) ? 1 << 29 : r.tile + (int)bytes;
    }
    return r;
}

}  // namespace cuda
}  // namespace fastdiff
