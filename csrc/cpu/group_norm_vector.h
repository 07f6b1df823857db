// Vectors of fp32 read from and written to any float dtype, and the sigmoid, for the kernels of group_norm_silu.
// Unlike functions.h this fuses multiplications with additions where the ISA can: ISAs differ by rounding.
#pragma once

#include "convert.h"
#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// the compiler would rather call what a loop does
#define FASTDIFF_INLINE __attribute__((always_inline))

typedef uint16_t U16 __attribute__((vector_size(FASTDIFF_BYTES / 2)));

// a difference, for v + 0 would lose the sign of a zero
inline F32 splat(float v) { return v - F32{}; }

inline F64 load(const double* p) {
    F64 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline void store(double* p, F64 v) { __builtin_memcpy(p, &v, sizeof v); }

// a b + c; the halves of a vector in double, and the sum of its doubles; 16-bit words to 32 bits and back
#if defined(__AVX512F__)

inline F32 multiply_add(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F64 first_half(F32 v) { return (F64)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
inline F64 second_half(F32 v) { return (F64)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
inline double added(F64 v) { return _mm512_reduce_add_pd((__m512d)v); }
inline U32 widened(U16 words) { return (U32)_mm512_cvtepu16_epi32((__m256i)words); }
inline U16 cut(U32 words) { return (U16)_mm512_cvtepi32_epi16((__m512i)words); }
inline F32 widen(U16 words, Float16) { return (F32)_mm512_cvtph_ps((__m256i)words); }
inline U16 narrowed(F32 v, Float16) { return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__AVX2__)

inline F32 multiply_add(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline F64 first_half(F32 v) { return (F64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
inline F64 second_half(F32 v) { return (F64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
inline double added(F64 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline U32 widened(U16 words) { return (U32)_mm256_cvtepu16_epi32((__m128i)words); }
inline U16 cut(U32 words) { return __builtin_convertvector(words, U16); }
inline F32 widen(U16 words, Float16) { return (F32)_mm256_cvtph_ps((__m128i)words); }
inline U16 narrowed(F32 v, Float16) { return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }

#else

#if defined(__ARM_FEATURE_FMA)
inline F32 multiply_add(F32 a, F32 b, F32 c) {
    for (int l = 0; l < LANES; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
}
#else
inline F32 multiply_add(F32 a, F32 b, F32 c) { return a * b + c; }
#endif

inline F64 first_half(F32 v) {
    F64 w{};
    for (int l = 0; l < LANES / 2; ++l) w[l] = v[l];
    return w;
}

inline F64 second_half(F32 v) {
    F64 w{};
    for (int l = 0; l < LANES / 2; ++l) w[l] = v[l + LANES / 2];
    return w;
}

inline double added(F64 v) { return v[0] + v[1]; }
inline U32 widened(U16 words) { return __builtin_convertvector(words, U32); }
inline U16 cut(U32 words) { return __builtin_convertvector(words, U16); }

inline F32 widen(U16 words, Float16) {
    F32 v;
    for (int l = 0; l < LANES; ++l) v[l] = widen(Float16{words[l]});
    return v;
}

inline U16 narrowed(F32 v, Float16) {
    U16 words;
    for (int l = 0; l < LANES; ++l) {
        Float16 w;
        narrow(v[l], &w);
        words[l] = w.word;
    }
    return words;
}

#endif

inline F32 widen(U16 words, Bfloat16) { return (F32)(widened(words) << 16); }

inline U16 narrowed(F32 v, Bfloat16) {
#if defined(__AVX512F__)
    const __m512i b = (__m512i)v, odd = _mm512_set1_epi32(0x10000), up = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
    const __m512i even = _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(b, odd), up, _mm512_set1_epi32(1));
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    return cut((U32)_mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, even, 16));
#else
    const U32 b = (U32)v, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return cut(v == v ? rounded : U32{} + 0x7fc0);
#endif
}

template <typename T>
inline F32 load(const T* p) {
    U16 words;
    __builtin_memcpy(&words, p, sizeof words);
    return widen(words, T{});
}

template <typename T>
inline void store(T* p, F32 v) {
    const U16 words = narrowed(v, T{});
    __builtin_memcpy(p, &words, sizeof words);
}

// the first `count` lanes, the others zero; nothing behind them is touched
#if defined(__AVX512F__)

inline F32 first_of(F32 v, int count) { return (F32)_mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), (__m512)v); }

inline F32 load(const float* p, int count) { return (F32)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p); }

inline void store(float* p, F32 v, int count) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v); }

template <typename T>
inline F32 load(const T* p, int count) {
    return widen((U16)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), T{});
}

template <typename T>
inline void store(T* p, F32 v, int count) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)narrowed(v, T{}));
}

#else

inline F32 first_of(F32 v, int count) {
    I32 lane;
    for (int l = 0; l < LANES; ++l) lane[l] = l;
    return lane < count ? v : F32{};
}

template <typename T>
inline F32 load(const T* p, int count) {
    T room[LANES] = {};
    for (int l = 0; l < count; ++l) room[l] = p[l];
    return load(room);
}

template <typename T>
inline void store(T* p, F32 v, int count) {
    T room[LANES];
    store(room, v);
    for (int l = 0; l < count; ++l) p[l] = room[l];
}

#endif

// -log2 e: what the next functions take is t = MINUS_LOG2_E y, so that e^-y = 2^t
constexpr float MINUS_LOG2_E = -0x1.715476p+0f;

// The next functions take a few rows, each step for all of them before the next one: as many chains of instructions
// side by side, which the compiler would put one behind the other.
#define FASTDIFF_ROWS _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r)

// t becomes MINUS_LOG2_E 2^t, for t from -127 to 128, where it is infinite; NaN stays. |f| <= 1/2 leaves 9e-8.
template <int ROWS>
FASTDIFF_INLINE inline void power(F32 (&t)[ROWS]) {
    F32 f[ROWS], shifted[ROWS], p[ROWS];
    FASTDIFF_ROWS shifted[r] = t[r] + 0x1.8p+23f;
    FASTDIFF_ROWS f[r] = t[r] - (shifted[r] - 0x1.8p+23f);
    FASTDIFF_ROWS p[r] = multiply_add(splat(-0x1.f5a9fp-10f), f[r], splat(-0x1.c9369ep-7f));
    FASTDIFF_ROWS p[r] = multiply_add(p[r], f[r], splat(-0x1.480222p-4f));
    FASTDIFF_ROWS p[r] = multiply_add(p[r], f[r], splat(-0x1.62e2a4p-2f));
    FASTDIFF_ROWS p[r] = multiply_add(p[r], f[r], splat(-0x1.fffff6p-1f));
    FASTDIFF_ROWS p[r] = multiply_add(p[r], f[r], splat(MINUS_LOG2_E));
    FASTDIFF_ROWS t[r] = p[r] * (F32)(((U32)shifted[r] + 127) << 23);
}

// MINUS_LOG2_E (1 + 2^t), infinite where 2^t overflows; where t is NaN t over it is NaN. 2^f is minimax, with its
// factor MINUS_LOG2_E in the coefficients: a division by the sum then takes that off t as well.
// t itself overflows for |y| > 2.3e38: such a positive y gives inf.
#if defined(__AVX512DQ__)

// bits of 2^(1 + i / 32), less i << 18
alignas(64) constexpr uint32_t POWERS[32] = {
    0x40000000, 0x3ffecd87, 0x3ffdaac3, 0x3ffc980f, 0x3ffb95c2, 0x3ffaa43a, 0x3ff9c3d3, 0x3ff8f4f0,  //
    0x3ff837f0, 0x3ff78d3a, 0x3ff6f532, 0x3ff67043, 0x3ff5fed7, 0x3ff5a15b, 0x3ff5583f, 0x3ff523f6,  //
    0x3ff504f3, 0x3ff4fbaf, 0x3ff508a4, 0x3ff52c4d, 0x3ff5672a, 0x3ff5b9be, 0x3ff6248c, 0x3ff6a81e,  //
    0x3ff744fd, 0x3ff7fbb8, 0x3ff8ccdf, 0x3ff9b907, 0x3ffac0c7, 0x3ffbe4ba, 0x3ffd257d, 0x3ffe83b3,
};

// t = k / 32 + f: a table has 2^(k / 32) and keeps the multipliers free; |f| <= 1/64 leaves 5.3e-8
template <int ROWS>
FASTDIFF_INLINE inline void one_and_power(const F32 (&t)[ROWS], F32 (&sum)[ROWS]) {
    const __m512i low = _mm512_load_si512(POWERS), high = _mm512_load_si512(POWERS + 16);
    F32 f[ROWS], shifted[ROWS], p[ROWS];
    U32 power[ROWS];
    // nearer to zero, with the sign of t: 127 makes the power infinite, -127 all but zero
    FASTDIFF_ROWS f[r] = (F32)_mm512_range_ps((__m512)t[r], _mm512_set1_ps(127), 2);
    FASTDIFF_ROWS shifted[r] = f[r] + 0x1.8p+18f;
    FASTDIFF_ROWS p[r] = shifted[r] - 0x1.8p+18f;
    FASTDIFF_ROWS f[r] = f[r] - p[r];
    FASTDIFF_ROWS p[r] = multiply_add(splat(-0x1.62e386p-3f), f[r], splat(-0x1.0000f6p-1f));
    FASTDIFF_ROWS power[r] = (U32)_mm512_permutex2var_epi32(low, (__m512i)shifted[r], high);
    FASTDIFF_ROWS power[r] += (U32)shifted[r] << 18;
    FASTDIFF_ROWS p[r] = multiply_add(p[r], f[r], splat(MINUS_LOG2_E / 2));
    FASTDIFF_ROWS sum[r] = multiply_add((F32)power[r], p[r], splat(MINUS_LOG2_E));
}

#else

template <int ROWS>
FASTDIFF_INLINE inline void one_and_power(const F32 (&t)[ROWS], F32 (&sum)[ROWS]) {
    // a comparison with NaN is false, so NaN passes
    FASTDIFF_ROWS sum[r] = t[r] > 128.0f ? splat(128.0f) : t[r];
    FASTDIFF_ROWS sum[r] = sum[r] < -127.0f ? splat(-127.0f) : sum[r];
    power(sum);
    FASTDIFF_ROWS sum[r] += MINUS_LOG2_E;
}

#endif

// t becomes silu
template <int ROWS>
FASTDIFF_INLINE inline void silu(F32 (&t)[ROWS]) {
    F32 sum[ROWS];
    one_and_power(t, sum);
    FASTDIFF_ROWS t[r] = t[r] / sum[r];
}

// t becomes the derivative of silu, s (1 + y (1 - s)) with s = 1 / (1 + e^-y)
template <int ROWS>
FASTDIFF_INLINE inline void silu_slope(F32 (&t)[ROWS]) {
    const F32 ln2 = splat(0x1.62e43p-1f);
    F32 s[ROWS];
    one_and_power(t, s);
    FASTDIFF_ROWS s[r] = MINUS_LOG2_E / s[r];
    // s - 1 is exact where it is small
    FASTDIFF_ROWS t[r] = s[r] * multiply_add(t[r] * ln2, s[r] - 1.0f, splat(1.0f));
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
