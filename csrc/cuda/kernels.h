// What the CUDA kernels take: raw pointers, sizes and a stream; no CUDA header, no torch, no Python.
// They launch and return; a launch that CUDA refuses throws std::runtime_error.
#pragma once

#include "../cpu/kernels.h"

namespace fastdiff {
namespace cuda {

// where and in which order: a device's number and a cudaStream_t
struct Queue {
    int device;
    void* stream;
};

// which normals
struct Draw {
    const int64_t *seed, *index;
    int64_t step;
    uint32_t stream;
};

// x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0; noise, where, eps and v may be null
struct QSample {
    const void *x0, *noise;
    Dtype x0_dtype, noise_dtype;
    const int64_t* t;
    const float* table;
    Draw draw;
    Strided where;  // of bool
    void *x_t, *eps, *v;
    Dtype dtype;  // of the three outputs
    int64_t images, channels, pixels;
};

// one row applied to the state, see fastdiff/ops/step.py; x_in.data, noise and bad may be null
struct Step {
    float *x, *h;
    Strided x_in, F;
    bool doubled, guided;  // x_in, F hold two halves of `images`
    const float* rows;
    const int64_t *k, *index, *seed;
    Variance variance;
    const float* noise;
    int64_t* bad;
    int64_t images, channels, pixels;
};

// a number a channel, or one an image and channel
struct PerChannel {
    const float* data;  // may be null
    int64_t image;      // from one image to the next; 0: one for all
};

// see fastdiff/ops/group_norm_silu.py and inject.py; tensors are dense, channels_last where it says so
struct GroupNorm {
    const void *x, *x2, *dy;  // x (N, first, pixels), x2 (N, channels - first, pixels); dy in the backward only
    const void* residual;     // of the injection alone, may be null
    void *y, *dx, *dx2;
    PerChannel weight, bias, add, scale, shift;
    float *stats, *sums, *workspace;  // (N, groups, 3), (N, channels, 3 or 2), workspace_size() floats
    Dtype dtype, residual_dtype;  // residual's: the same, or fp32
    bool channels_last, act;
    int64_t images, first, channels, pixels;
    int groups;  // 0: no norm, the injection alone
    float eps;
};

// How blocks and threads share a norm. A thread owns `wide` channels (a column of the tile) and every lanes-th vector
// of pixels of its split; a tile of whole columns and a split make a block.
struct Plan {
    bool one_pass;        // the tile stays in shared memory, and the splits of a tile form a cluster
    bool vectors;         // accesses of 16 bytes; else number by number
    int wide, deep;       // channels and pixels of a vector
    int columns, lanes;   // threads in use
    int tiles, splits;
    int64_t range;        // vectors of pixels of a split
    int shared;           // bytes a block
};

// a device, as far as plans depend on it
struct Device {
    int processors, shared_block, shared_processor, clusters;  // clusters: the largest one, 1 where there are none
};

Device device(int number);
Plan plan(const GroupNorm& call, const Device& device, bool backward);
int64_t workspace_size(const GroupNorm& call, const Plan& plan);

void normal(float* out, const Draw& draw, int64_t images, int64_t size, const Queue& queue);
void q_sample(const QSample& call, const Queue& queue);
void step(const Step& call, const Queue& queue);
void group_norm(const GroupNorm& call, const Plan& plan, const Queue& queue);
void group_norm_backward(const GroupNorm& call, const Plan& plan, const Queue& queue);

}  // namespace cuda
}  // namespace fastdiff
