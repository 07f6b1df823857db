// What the kernels of group_norm_backward.cu do with one vector of x and dy.
#pragma once

#include "group_norm.cuh"

namespace fastdiff {
namespace cuda {

FASTDIFF_DEVICE Channel saved_channel(const GroupNorm& call, int64_t n, int64_t c) {
    const float* stats = call.stats + (n * call.groups + c / (call.channels / call.groups)) * 3;
    return channel_of(call, n, c, stats[0], stats[1], stats[2]);
}

FASTDIFF_DEVICE float* sums_of(const GroupNorm& call, int64_t n, int64_t c) {
    return call.sums + (n * call.channels + c) * (call.groups ? 3 : 2);
}

// s2 = sum dn xhat of s1 = sum dn and sum dn (x - M)
FASTDIFF_DEVICE float about_mean(const Channel& c, float s1, float s2) { return fused(c.r, s2, c.d * s1); }

// c1, c2: means over the group of w dn and w dn xhat
FASTDIFF_DEVICE Scales backward_scales(const Channel& c, float c1, float c2) {
    return {c.A, c.M, c.B, c.r * c.r * c2, c.r * fused(c.d, c2, c1), {}};
}

template <typename V>
struct Pair {
    typename V::Raw x, dy;
};

template <int WIDE>
struct Slopes : Owned<WIDE> {
    float U[WIDE], T[WIDE];

    FASTDIFF_DEVICE explicit Slopes(const Scales* s) : Owned<WIDE>(s) {
#pragma unroll
        for (int w = 0; w < WIDE; ++w) U[w] = s[w].U, T[w] = s[w].T;
    }
};

// x - M and dn of one vector
template <typename V>
FASTDIFF_DEVICE void slopes(const GroupNorm& call, const Owned<V::WIDE>& own, const Pair<V>& raw, float (&d)[V::SIZE],
                            float (&dn)[V::SIZE]) {
    V::widened(raw.x, d);
    V::widened(raw.dy, dn);
#pragma unroll
    for (int e = 0; e < V::SIZE; ++e) {
        const int w = V::WIDE > 1 ? e : 0;
        d[e] -= own.M[w];
        if (call.act) dn[e] *= silu_slope(fused(own.A[w], d[e], own.B[w]));
    }
}

// sums[2 w] = sum dn, sums[2 w + 1] = sum dn (x - M)
template <typename V>
FASTDIFF_DEVICE void add_slopes(const float (&d)[V::SIZE], const float (&dn)[V::SIZE], float (&sums)[V::WIDE * 2]) {
#pragma unroll
    for (int e = 0; e < V::SIZE; ++e) {
        const int w = V::WIDE > 1 ? e : 0;
        sums[2 * w] += dn[e];
        sums[2 * w + 1] = fused(dn[e], d[e], sums[2 * w + 1]);
    }
}

// dz of one vector, in place of dn
template <typename V>
FASTDIFF_DEVICE void finished(const Slopes<V::WIDE>& own, const float (&d)[V::SIZE], float (&dn)[V::SIZE]) {
#pragma unroll
    for (int e = 0; e < V::SIZE; ++e) {
        const int w = V::WIDE > 1 ? e : 0;
        dn[e] = fused(own.A[w], dn[e], -fused(own.U[w], d[e], own.T[w]));
    }
}

// where the vectors of x, dy and dx lie
template <typename V>
struct Streams {
    const GroupNorm& call;
    const Half2 half;
    const Cursor whole;
    const void* x;
    void* dx;

    FASTDIFF_DEVICE Streams(const GroupNorm& call_, const Plan& plan, const Place& place)
        : call(call_),
          half(call_, plan, place),
          whole(call_, plan, place, 0, call_.channels),
          x(half.of(call_.x, call_.x2)),
          dx(half.of(call_.dx, call_.dx2)) {}

    FASTDIFF_DEVICE Pair<V> read(int j) const {
        return {V::read(x, call.dtype, half.cursor(j)), V::read(call.dy, call.dtype, whole(j))};
    }
    FASTDIFF_DEVICE void write(int j, const float* v) const { V::write(dx, call.dtype, half.cursor(j), v); }
};

}  // namespace cuda
}  // namespace fastdiff
