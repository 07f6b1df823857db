// fp32 to and from bf16, fp16 and uint8, round to nearest even, as plain loops that the compiler vectorises.
#pragma once

#include "kernels.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

inline uint32_t bits(float v) {
    uint32_t b;
    __builtin_memcpy(&b, &v, sizeof b);
    return b;
}

inline float from_bits(uint32_t b) {
    float v;
    __builtin_memcpy(&v, &b, sizeof v);
    return v;
}

struct Bfloat16 {
    uint16_t word;
};

struct Float16 {
    uint16_t word;
};

inline float widen(float v) { return v; }
inline float widen(uint8_t v) { return (float)v / 127.5f - 1.0f; }
inline float widen(Bfloat16 v) { return from_bits((uint32_t)v.word << 16); }

inline float widen(Float16 v) {
    const uint32_t sign = (v.word & 0x8000u) << 16, magnitude = v.word & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    // a subnormal is an integer times 2^-24; going by the integer survives a flush-to-zero mode
    const uint32_t subnormal = bits((float)(int32_t)magnitude * 0x1p-24f);
    return from_bits(sign | (magnitude < 0x400 ? subnormal : normal));
}

inline void narrow(float v, float* out) { *out = v; }

inline void narrow(float v, Bfloat16* out) {
    const uint32_t b = bits(v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    out->word = (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void narrow(float v, Float16* out) {
    const uint32_t b = bits(v), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
    const uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    // adding 1/2 makes the hardware round at 2^-24, the spacing of the subnormals
    const uint32_t subnormal = bits(from_bits(a) + 0.5f) - 0x3f000000;
    uint32_t word = a < 0x38800000 ? subnormal : normal;
    word = a >= 0x477ff000 ? 0x7c00 : word;  // from 65520 on, half way past the largest
    word = a > 0x7f800000 ? 0x7e00 : word;
    out->word = (uint16_t)(sign | word);
}

constexpr int64_t width(Dtype dtype) { return dtype == FLOAT32 ? 4 : dtype == UINT8 ? 1 : 2; }

// no call with a stride converts more than this at once
constexpr int64_t TILE = 1024;

template <typename T>
inline void widen(const T* from, int64_t stride, int64_t count, float* to) {
    T room[TILE];
    if (stride != 1) {
        // gathered first, so that the conversion runs on whole vectors
        for (int64_t j = 0; j < count; ++j) room[j] = from[j * stride];
        from = room;
    }
    for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
}

template <typename T>
inline void narrow(float scale, const float* from, int64_t stride, int64_t count, T* to) {
    T room[TILE];
    T* out = stride == 1 ? to : room;
    for (int64_t j = 0; j < count; ++j) narrow(scale * from[j], out + j);
    if (stride != 1)
        for (int64_t j = 0; j < count; ++j) to[j * stride] = room[j];
}

inline void widen(const void* from, Dtype dtype, int64_t offset, int64_t stride, int64_t count, float* to) {
    if (dtype == FLOAT32) widen((const float*)from + offset, stride, count, to);
    if (dtype == BFLOAT16) widen((const Bfloat16*)from + offset, stride, count, to);
    if (dtype == FLOAT16) widen((const Float16*)from + offset, stride, count, to);
    if (dtype == UINT8) widen((const uint8_t*)from + offset, stride, count, to);
}

// scale * from, rounded once more to dtype
inline void narrow(float scale, const float* from, void* to, Dtype dtype, int64_t offset, int64_t stride,
                   int64_t count) {
    if (dtype == FLOAT32) narrow(scale, from, stride, count, (float*)to + offset);
    if (dtype == BFLOAT16) narrow(scale, from, stride, count, (Bfloat16*)to + offset);
    if (dtype == FLOAT16) narrow(scale, from, stride, count, (Float16*)to + offset);
}

// the count floats at `offset`, where they lie or converted into `buffer`
inline const float* floats(const void* from, Dtype dtype, int64_t offset, int64_t count, float* buffer) {
    if (dtype == FLOAT32) return (const float*)from + offset;
    widen(from, dtype, offset, 1, count, buffer);
    return buffer;
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
