// What the CUDA kernels are made of: the hardware's approximate functions, vectors of 16 bytes, clusters.
// FASTDIFF_EMULATED: the same kernels as plain C++ on a CPU, for tests (tests/ops/emulated_cuda).
#pragma once

#include <cuda_runtime.h>

#include "../philox.h"
#include "kernels.h"

#ifdef FASTDIFF_EMULATED
#include "emulated.h"
#else
#define FASTDIFF_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FASTDIFF_DEVICE __device__ __forceinline__
#define FASTDIFF_DEVICE_AND_HOST __host__ __device__ __forceinline__
#define FASTDIFF_KERNEL(threads) __global__ void __launch_bounds__(threads)
// so many blocks a processor at least
#define FASTDIFF_KERNEL_N(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fastdiff {
namespace cuda {

#define FASTDIFF_APPROXIMATE(name, instruction)                \
    FASTDIFF_DEVICE float name(float x) {                      \
        float y;                                               \
        asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
        return y;                                              \
    }
FASTDIFF_APPROXIMATE(log2_fast, "lg2")
FASTDIFF_APPROXIMATE(exp2_fast, "ex2")
FASTDIFF_APPROXIMATE(sqrt_fast, "sqrt")
FASTDIFF_APPROXIMATE(reciprocal_fast, "rcp")
FASTDIFF_APPROXIMATE(sin_fast, "sin")
FASTDIFF_APPROXIMATE(cos_fast, "cos")

// plain min and max return the bound for NaN
FASTDIFF_DEVICE float min_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

FASTDIFF_DEVICE float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// two numbers of 16 bits in a word, the first one in its low half
FASTDIFF_DEVICE float2 unpack_half(uint32_t word) {
    float2 y;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(y.x), "=f"(y.y)
        : "r"(word));
    return y;
}

FASTDIFF_DEVICE uint32_t pack_half(float a, float b) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}

FASTDIFF_DEVICE uint32_t pack_bfloat(float a, float b) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}

FASTDIFF_DEVICE uint2 wide_product(uint32_t a, uint32_t b) {
    uint2 y;
    asm("{ .reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(y.x), "=r"(y.y) : "r"(a), "r"(b));
    return y;
}

FASTDIFF_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTDIFF_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }
FASTDIFF_DEVICE float sum_of_warp(float v) {
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// Blocks of a cluster; before sm_90 a block is its own cluster, and the launch asks for none.
#if __CUDA_ARCH__ >= 900
FASTDIFF_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
FASTDIFF_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
FASTDIFF_DEVICE float cluster_read(const float* mine, int rank) {
    uint32_t here = (uint32_t)__cvta_generic_to_shared(mine), there;
    float v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
    return v;
}
#else
FASTDIFF_DEVICE void cluster_arrive() {}
FASTDIFF_DEVICE void cluster_wait() { __syncthreads(); }
FASTDIFF_DEVICE float cluster_read(const float* mine, int) { return *mine; }
#endif

}  // namespace cuda
}  // namespace fastdiff
#endif

namespace fastdiff {
namespace cuda {

struct Bfloat {
    uint16_t word;
};
struct Half {
    uint16_t word;
};
// a number whose type is known at run time only
struct Any {};

FASTDIFF_DEVICE float2 widen(uint32_t word, Half) { return unpack_half(word); }
FASTDIFF_DEVICE float2 widen(uint32_t word, Bfloat) {
    float2 y;
    y.x = as_float(word << 16), y.y = as_float(word & 0xffff0000u);
    return y;
}
FASTDIFF_DEVICE uint32_t narrow(float a, float b, Half) { return pack_half(a, b); }
FASTDIFF_DEVICE uint32_t narrow(float a, float b, Bfloat) { return pack_bfloat(a, b); }

// u / 127.5 - 1, the quotient rounded to nearest as a division would
FASTDIFF_DEVICE float pixel(uint32_t u) {
    const float v = (float)u, q = v * (1 / 127.5f);
    return fused(fused(-q, 127.5f, v), 1 / 127.5f, q) - 1;
}

template <typename T>
FASTDIFF_DEVICE void widen(const uint4& raw, float* v, T tag) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 pair = widen(words[j], tag);
        v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
    }
}
FASTDIFF_DEVICE void widen(const uint4& raw, float* v, float) {
    v[0] = as_float(raw.x), v[1] = as_float(raw.y), v[2] = as_float(raw.z), v[3] = as_float(raw.w);
}

template <typename T>
FASTDIFF_DEVICE uint4 narrowed(const float* v, T tag) {
    return make_uint4(narrow(v[0], v[1], tag), narrow(v[2], v[3], tag), narrow(v[4], v[5], tag),
                      narrow(v[6], v[7], tag));
}
FASTDIFF_DEVICE uint4 narrowed(const float* v, float) {
    const float4 y = make_float4(v[0], v[1], v[2], v[3]);
    return *reinterpret_cast<const uint4*>(&y);
}

// one number
template <typename T>
FASTDIFF_DEVICE float load(const void* data, int64_t i, T tag) {
    return widen((uint32_t) static_cast<const T*>(data)[i].word, tag).x;
}
FASTDIFF_DEVICE float load(const void* data, int64_t i, float) { return static_cast<const float*>(data)[i]; }
FASTDIFF_DEVICE float load(const void* data, int64_t i, uint8_t) {
    return pixel(static_cast<const uint8_t*>(data)[i]);
}

// one number of a type known at run time
FASTDIFF_DEVICE float load(const void* data, Dtype dtype, int64_t i) {
    switch (dtype) {
        case FLOAT32: return load(data, i, float{});
        case UINT8: return load(data, i, uint8_t{});
        case BFLOAT16: return load(data, i, Bfloat{});
        default: return load(data, i, Half{});
    }
}

FASTDIFF_DEVICE void store(void* data, Dtype dtype, int64_t i, float v) {
    switch (dtype) {
        case FLOAT32: static_cast<float*>(data)[i] = v; return;
        case BFLOAT16: static_cast<uint16_t*>(data)[i] = (uint16_t)narrow(v, 0.0f, Bfloat{}); return;
        default: static_cast<uint16_t*>(data)[i] = (uint16_t)narrow(v, 0.0f, Half{}); return;
    }
}

FASTDIFF_DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

}  // namespace cuda
}  // namespace fastdiff
