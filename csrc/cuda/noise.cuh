// Eight standard normals by two Philox blocks and the hardware's approximate functions; the layout is in ../philox.h.
#pragma once

#include "device.cuh"

namespace fastdiff {
namespace cuda {

// -2 ln u = -2 ln 2 log2 u; within 5e-6 of the exact normal, within 5e-4 where r < 0.05
FASTDIFF_DEVICE void box_muller(uint32_t word0, uint32_t word1, float* z) {
    const float u0 = fused((float)word0, 0x1p-32f, 0x1p-33f), u1 = fused((float)word1, 0x1p-32f, 0x1p-33f);
    // u0 <= 1: the absolute value, which costs nothing, takes away no more than an error of the logarithm
    const float r = sqrt_fast(fabsf(log2_fast(u0) * 1.38629436f)), angle = u1 * 6.28318531f;
    z[0] = r * cos_fast(angle);
    z[1] = r * sin_fast(angle);
}

// philox() of ../philox.h; its product of 64 bits, written as one, costs ptxas an addition of zero for each half
FASTDIFF_DEVICE Counter philox_fast(Counter n, int64_t seed) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        const uint2 p0 = wide_product(n.c[0], PHILOX_M0), p1 = wide_product(n.c[2], PHILOX_M1);
        n = {{p1.y ^ n.c[1] ^ k0, p1.x, p0.y ^ n.c[3] ^ k1, p0.x}};
    }
    return n;
}

struct Stream {
    int64_t seed, index;
    uint32_t step, stream;
};

// the normals of positions 4 block .. 4 block + 7
FASTDIFF_DEVICE void normals(const Stream& s, uint32_t block, float (&z)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Counter w = philox_fast(philox_counter(block + half, s.step, s.stream, s.index), s.seed);
        box_muller(w.c[0], w.c[1], z + 4 * half);
        box_muller(w.c[2], w.c[3], z + 4 * half + 2);
    }
}

}  // namespace cuda
}  // namespace fastdiff
