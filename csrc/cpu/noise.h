// Standard normals of one image by Philox and Box-Muller, four vectors at a time. The layout is in ../philox.h.
#pragma once

#include "../philox.h"
#include "functions.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

constexpr int BATCH = 4 * LANES;

// room that normals() needs to fill count floats from any position
constexpr int noise_room(int count) { return (count / BATCH + 3) * BATCH; }

struct Stream {
    uint32_t seed[2], step_and_stream, index[2];

    Stream(int64_t seed_, int64_t step, uint32_t stream, int64_t index_)
        : seed{(uint32_t)seed_, (uint32_t)((uint64_t)seed_ >> 32)},
          step_and_stream((uint32_t)step | stream << 24),
          index{(uint32_t)index_, (uint32_t)((uint64_t)index_ >> 32)} {}
};

// 2^32 u of the words in the low halves of even and odd lanes
inline F32 uniform(U64 even, U64 odd) {
    const U32 word = (U32)((even & 0xffffffffu) | odd << 32);
#if defined(__AVX512F__)
    const F32 value = __builtin_convertvector(word, F32);
#else
    // no unsigned conversion here: both halves convert exactly, and their sum is rounded once
    const F32 value = __builtin_convertvector((I32)(word >> 16), F32) * 0x1p+16f +
                      __builtin_convertvector((I32)(word & 0xffffu), F32);
#endif
    return value + 0.5f;
}

// Chains of Philox blocks in flight, step by step side by side: one alone waits for its own multiplications.
constexpr int CHAINS = 4;

// One Philox block in each 64-bit lane; the high halves hold leftovers that nothing reads.
inline void rounds(U64 c[CHAINS][4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
#pragma GCC unroll 8
        for (int j = 0; j < CHAINS; ++j) {
            const U64 p0 = multiply_low(c[j][0], PHILOX_M0), p1 = multiply_low(c[j][2], PHILOX_M1);
            c[j][0] = (p1 >> 32) ^ c[j][1] ^ k0;
            c[j][2] = (p0 >> 32) ^ c[j][3] ^ k1;
            c[j][1] = p1;
            c[j][3] = p0;
        }
    }
}

inline void uniforms(Stream stream, uint64_t block, int64_t batches, float* u) {
    U64 first[CHAINS];
    for (int j = 0; j < CHAINS; ++j)
        for (int l = 0; l < LANES / 2; ++l) first[j][l] = j / 2 * LANES + counter_of(2 * l + j % 2);
    const U64 c1 = U64{} + stream.step_and_stream, c2 = U64{} + stream.index[0], c3 = U64{} + stream.index[1];
    for (; batches > 0; batches -= CHAINS / 2, block += CHAINS / 2 * LANES, u += CHAINS / 2 * BATCH) {
        U64 c[CHAINS][4];
        for (int j = 0; j < CHAINS; ++j) c[j][0] = first[j] + block, c[j][1] = c1, c[j][2] = c2, c[j][3] = c3;
        rounds(c, stream.seed[0], stream.seed[1]);
        for (int b = 0; b < CHAINS / 2; ++b)
            for (int j = 0; j < 4; ++j) store(u + b * BATCH + j * LANES, uniform(c[2 * b][j], c[2 * b + 1][j]));
    }
}

inline void box_muller(int64_t batches, float* z) {
    for (; batches > 0; --batches, z += BATCH) {
        // u0 <= 1, so the logarithm needs no clamp
        const F32 r = square_root(minus_two_ln(load(z))), q = square_root(minus_two_ln(load(z + 2 * LANES)));
        const Pair a = turn(load(z + LANES)), b = turn(load(z + 3 * LANES));
        store_interleaved(z, r * a.cosine, r * a.sine, q * b.cosine, q * b.sine);
    }
}

// Fills z so that the result points to the normal of position i, with the next count - 1 behind it.
// Two loops: one would be a dependency chain longer than what a core looks ahead.
inline const float* normals(const Stream& stream, int64_t i, int64_t count, float* z) {
    const int64_t batches = (i % 4 + count + BATCH - 1) / BATCH;
    uniforms(stream, (uint64_t)(i / 4), batches, z);
    box_muller(batches, z);
    return z + i % 4;
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
