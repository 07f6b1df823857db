// Philox4x32-10 (Salmon 2011) with fastdiff's counter layout, for host and device: the layout is an API.
//
//   key     = (seed_lo, seed_hi)
//   counter = (i / 4, step | stream << 24, index_lo, index_hi)     i: row-major position inside one image
//   u       = float(word) 2^-32 + 2^-33                            fp32, round to nearest
//   n0, n1  = r cos(2 pi u1), r sin(2 pi u1),  r = sqrt(max(0, -2 ln u0))    words (0, 1); n2, n3: words (2, 3)
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTDIFF_HD __host__ __device__ __forceinline__
#else
#define FASTDIFF_HD inline
#endif

namespace fastdiff {
// internal linkage: an inline function shared by files compiled for different ISAs would be merged by the linker
namespace {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

enum : uint32_t { STREAM_X_T, STREAM_STEP, STREAM_Q_SAMPLE, STREAM_RENOISE };

struct Counter {
    uint32_t c[4];
};

FASTDIFF_HD Counter philox_counter(uint32_t block, uint32_t step, uint32_t stream, int64_t index) {
    return {{block, step | stream << 24, (uint32_t)index, (uint32_t)((uint64_t)index >> 32)}};
}

FASTDIFF_HD Counter philox(Counter n, int64_t seed) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint64_t p0 = (uint64_t)n.c[0] * PHILOX_M0, p1 = (uint64_t)n.c[2] * PHILOX_M1;
        n = {{(uint32_t)(p1 >> 32) ^ n.c[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ n.c[3] ^ k1, (uint32_t)p0}};
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    return n;
}

FASTDIFF_HD float philox_uniform(uint32_t word) {
    return (float)word * 0x1p-32f + 0x1p-33f;  // the product is exact, so contraction to an fma changes nothing
}

}  // namespace
}  // namespace fastdiff
