// Vectors of the widest registers that this file is compiled for. Arithmetic is the compiler's own on vector types;
// only what it has no operator for is written here, in intrinsics on x86-64 and in plain loops elsewhere.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
// gcc 12 takes the deliberately undefined operands inside these headers for mistakes
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(__AVX512F__)
#define FASTDIFF_BYTES 64
#define FASTDIFF_MM(name) _mm512_##name
#define FASTDIFF_M(kind) __m512##kind
#elif defined(__AVX2__)
#define FASTDIFF_BYTES 32
#define FASTDIFF_MM(name) _mm256_##name
#define FASTDIFF_M(kind) __m256##kind
#else
#define FASTDIFF_BYTES 16
#define FASTDIFF_MM(name) _mm_##name
#define FASTDIFF_M(kind) __m128##kind
#endif

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

typedef float F32 __attribute__((vector_size(FASTDIFF_BYTES)));
typedef double F64 __attribute__((vector_size(FASTDIFF_BYTES)));
typedef int32_t I32 __attribute__((vector_size(FASTDIFF_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(FASTDIFF_BYTES)));
typedef uint64_t U64 __attribute__((vector_size(FASTDIFF_BYTES)));

constexpr int LANES = FASTDIFF_BYTES / 4;

inline F32 load(const float* p) {
    F32 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__x86_64__)

// products of the low halves of the 64-bit lanes; what is in the high halves does not matter
inline U64 multiply_low(U64 a, uint32_t m) {
    return (U64)FASTDIFF_MM(mul_epu32)((FASTDIFF_M(i))a, (FASTDIFF_M(i))(U64{} + m));
}

inline F32 square_root(F32 v) { return (F32)FASTDIFF_MM(sqrt_ps)((FASTDIFF_M())v); }

// out[4 c + j] of counter c is lane lane_of(c) of v[j]: in-register interleaving never crosses 128 bits
inline void store_interleaved(float* out, F32 v0, F32 v1, F32 v2, F32 v3) {
    const F64 a = (F64)FASTDIFF_MM(unpacklo_ps)((FASTDIFF_M())v0, (FASTDIFF_M())v1);
    const F64 b = (F64)FASTDIFF_MM(unpackhi_ps)((FASTDIFF_M())v0, (FASTDIFF_M())v1);
    const F64 c = (F64)FASTDIFF_MM(unpacklo_ps)((FASTDIFF_M())v2, (FASTDIFF_M())v3);
    const F64 d = (F64)FASTDIFF_MM(unpackhi_ps)((FASTDIFF_M())v2, (FASTDIFF_M())v3);
    store(out, (F32)FASTDIFF_MM(unpacklo_pd)((FASTDIFF_M(d))a, (FASTDIFF_M(d))c));
    store(out + LANES, (F32)FASTDIFF_MM(unpackhi_pd)((FASTDIFF_M(d))a, (FASTDIFF_M(d))c));
    store(out + 2 * LANES, (F32)FASTDIFF_MM(unpacklo_pd)((FASTDIFF_M(d))b, (FASTDIFF_M(d))d));
    store(out + 3 * LANES, (F32)FASTDIFF_MM(unpackhi_pd)((FASTDIFF_M(d))b, (FASTDIFF_M(d))d));
}

#else

inline U64 multiply_low(U64 a, uint32_t m) { return (a & 0xffffffffu) * m; }

inline F32 square_root(F32 v) {
    for (int l = 0; l < LANES; ++l) v[l] = __builtin_sqrtf(v[l]);
    return v;
}

inline void store_interleaved(float* out, F32 v0, F32 v1, F32 v2, F32 v3) {
    for (int c = 0; c < LANES; ++c) {
        out[4 * c] = v0[c];
        out[4 * c + 1] = v1[c];
        out[4 * c + 2] = v2[c];
        out[4 * c + 3] = v3[c];
    }
}

#endif

// the counter, of LANES consecutive ones, whose words store_interleaved expects in a lane
constexpr int counter_of(int lane) { return LANES / 4 * (lane % 4) + lane / 4; }

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
