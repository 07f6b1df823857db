// What conv.cpp and its relatives take; formula: fastdiff/ops/norm_silu_conv.py. Maps are fp32, (N, height, width, C).
#pragma once

#include "group_norm.h"

namespace fastdiff {

// z = act(norm(cat([x, x2], channels)) (1 + scale) + shift); groups = 0: z = cat([x, x2]), and nothing of a norm is read
struct Maps {
    const float *x, *x2;
    int64_t x_channels, channels;
    int64_t images, height, width;
    int64_t groups;
    double eps;
    PerChannel weight, bias, scale, shift;
    const double *moments, *moments2;  // of x, of x2: (N, C, 2), mean and variance of each channel
    bool act;
};

// y + bias + add + residual, and the moments of that (N, C, 2); bias, add, residual, moments may be null. A pixel of y lies
// `apart` floats behind the one before.
struct Sum {
    float* y;
    int64_t channels, apart;
    const float* bias;
    PerChannel add;
    const float* residual;
    double* moments;
};

// 1x1, 3x3, 3x3 of an image whose pixels are repeated, 3x3 of stride 2
enum Kind : int { POINTWISE, SAME, UPSAMPLED, STRIDED };

// weight: (panels, C, taps, 32), panels of 32 outputs, the last one with zeros behind; taps row by row, one if POINTWISE.
// append: z itself lies behind the channels of y's pixels; of a POINTWISE one with a norm.
struct Conv {
    Kind kind;
    bool append;
    Maps in;
    const float* weight;
    Sum out;
    int64_t stride, before;  // of the windows of 3x3, and how many zeros lie before the first pixel of an axis
};

// out of q (N, tokens, heads, depth) and of k and v (N, keys, heads, depth), whose tokens are `apart` and `keys_apart`
// floats apart; without bias and add
struct Attention {
    const float *q, *k, *v;
    int64_t apart, keys_apart, images, tokens, keys, heads, depth;
    Sum out;
};

// y = h W' + bias + residual, (tokens, outputs), of h = norm(x) or x; formula: fastdiff/ops/norm_linear.py. Rows of x lie
// `apart` floats apart. weight: panels as Conv's; with a gate those of a and g by turns, and bias is a's, then g's.
struct Linear {
    const float* x;
    int64_t apart, tokens, channels;
    bool norm;
    double eps;
    const float *norm_weight, *norm_bias;  // these, bias and residual may be null
    const float *weight, *bias;
    int64_t outputs;
    bool gate;
    const float* residual;
    float* y;
};

struct Kernel {
    enum { CONV, ATTENTION, LINEAR } what;
    union {
        Conv conv;
        Attention attention;
        Linear linear;
    };
};

// play: one kernel after the other, all on the same threads, which see what the one before has written; room: the most
// of their kernel_room in bytes, at a multiple of 64
#define FASTDIFF_DECLARE_CONV(isa)                                                                            \
    namespace isa {                                                                                           \
    int64_t kernel_room(const Kernel& kernel, int threads);                                                   \
    void play(const Kernel* kernels, int64_t count, void* room, int threads);                                 \
    void moments(const float* x, int64_t images, int64_t pixels, int64_t channels, double* out, int threads); \
    }
FASTDIFF_DECLARE_CONV(base)
FASTDIFF_DECLARE_CONV(v3)
FASTDIFF_DECLARE_CONV(v4)

}  // namespace fastdiff
