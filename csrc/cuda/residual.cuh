// What the injection adds behind the SiLU, to a vector V of group_norm.cuh: nothing, or numbers that lie as x does.
#pragma once

#include "group_norm.cuh"

namespace fastdiff {
namespace cuda {

struct NoResidual {
    struct Raw {};
    FASTDIFF_DEVICE static Raw read(const void*, Dtype, int64_t) { return {}; }
    FASTDIFF_DEVICE static void add(const Raw&, float*) {}
};

// numbers of x's own type
template <typename V>
struct Residual {
    using Raw = typename V::Raw;
    FASTDIFF_DEVICE static Raw read(const void* data, Dtype dtype, int64_t at) { return V::read(data, dtype, at); }
    FASTDIFF_DEVICE static void add(const Raw& raw, float* v) {
        float own[V::SIZE];
        V::widened(raw, own);
#pragma unroll
        for (int e = 0; e < V::SIZE; ++e) v[e] += own[e];
    }
};

// fp32 beside a vector of eight
struct WideResidual {
    struct Raw {
        uint4 halves[2];
    };
    FASTDIFF_DEVICE static Raw read(const void* data, Dtype, int64_t at) {
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + at);
        return {{from[0], from[1]}};
    }
    FASTDIFF_DEVICE static void add(const Raw& raw, float* v) {
        float own[8];
        widen(raw.halves[0], own, float{}), widen(raw.halves[1], own + 4, float{});
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] += own[e];
    }
};

// body(v, residual)
template <typename Body>
void with_residual(const GroupNorm& call, const Plan& plan, const Body& body) {
    with_vectors(call, plan, [&](auto v) {
        using V = decltype(v);
        if (!call.residual) return body(v, NoResidual{});
        // one number at a time has its type at run time
        if constexpr (V::SIZE == 8)
            if (call.residual_dtype == FLOAT32) return body(v, WideResidual{});
        body(v, Residual<V>{});
    });
}

}  // namespace cuda
}  // namespace fastdiff
