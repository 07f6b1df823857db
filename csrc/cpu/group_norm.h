// What the kernels of group_norm_silu and inject take; formula: fastdiff/ops/group_norm_silu.py. No torch, no Python.
#pragma once

#include "kernels.h"

namespace fastdiff {

// element (n, c) of an fp32 tensor (C,) or (N, C) is data[n image + c]; no data: an argument that was left out
struct PerChannel {
    const float* data;
    int64_t image;
};

// z = cat([x, x2], 1), of `channels` channels, dense as (N, C, pixels) or (N, pixels, C); what comes out lies likewise
struct Normed {
    const void *x, *x2;
    int64_t x_channels;
    Dtype dtype;
    bool channels_last;
    int64_t images, channels, pixels, groups;
    PerChannel weight, bias, add, scale, shift;
    bool act;
    int threads;
};

// stats (N, groups, 3): mean and its remainder, 1 / std
struct GroupNorm {
    Normed in;
    double eps;
    void* y;
    float* stats;
};

// sums (N, C, 3): of dn, dn xhat, dz over the pixels
struct GroupNormBackward {
    Normed in;
    const float* stats;
    const void* dy;
    void *dx, *dx2;
    float* sums;
};

// no groups, weight, bias and x2; residual, which may be null, lies as x does, in its dtype or fp32
struct Inject {
    Normed in;
    const void* residual;
    Dtype residual_dtype;
    void* y;
};

// sums (N, C, 2): of dn, dn (x + add) over the pixels
struct InjectBackward {
    Normed in;
    const void* dy;
    void* dx;
    float* sums;
};

// all return false when there is no memory for the sums
#define FASTDIFF_DECLARE_NORM(isa)                            \
    namespace isa {                                           \
    bool group_norm(const GroupNorm& call);                   \
    bool group_norm_backward(const GroupNormBackward& call);  \
    bool inject(const Inject& call);                          \
    bool inject_backward(const InjectBackward& call);         \
    }
FASTDIFF_DECLARE_NORM(base)
FASTDIFF_DECLARE_NORM(v3)
FASTDIFF_DECLARE_NORM(v4)

}  // namespace fastdiff
