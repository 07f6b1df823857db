// What the CPU kernels take: raw pointers and sizes, no torch, no Python. Each kernel exists once per ISA.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastdiff {

enum Dtype : int { FLOAT32, BFLOAT16, FLOAT16, UINT8 };

// columns of a step row; fastdiff/row.py is the contract, and a test compares the two
#define FASTDIFF_COLUMNS                                                                                             \
    T, C_IN, C_SKIP, C_OUT, W, A, B0, BF, B1, B2, B3, S, P, Q, ALPHA, SIGMA, SLOT, CLIP, END, V0, V1, V2, V3
enum Column : int { FASTDIFF_COLUMNS, COLUMNS };

enum Variance : int { VARIANCE_NONE, VARIANCE_RANGE, VARIANCE_MOMENT };

// element (n, c, p) of a tensor (N, C, *spatial) is data[n image + c channel + p pixel]
struct Strided {
    void* data;
    Dtype dtype;
    int64_t image, channel, pixel;
};

// out[n][i]: normal i of image index[n]
struct Normal {
    float* out;
    const int64_t *seed, *index;
    int64_t step;
    uint32_t stream;
    int64_t images, size;
    int threads;
};

// x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0; noise, where.data, eps and v may be null
struct QSample {
    const void *x0, *noise;
    Strided where;  // bytes: x_t is x0 where they are 0
    Dtype x0_dtype, noise_dtype;
    const int64_t* t;
    const float* table;
    const int64_t *seed, *index;
    int64_t step;
    uint32_t stream;
    void *x_t, *eps, *v;
    Dtype dtype;  // of the three outputs
    int64_t images, channels, pixels;
    int threads;
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
    int threads;
};

// [sin, cos] of scale t f_j, [cos, sin] with flip; a zero behind them where dim is odd
struct TimeEmbed {
    const void* t;
    bool whole;                 // t is int64, else float
    const double* frequencies;  // f_j, dim / 2 of them, monotone; a vector may be read behind them
    double scale;
    bool flip;
    void* out;
    Dtype dtype;
    int64_t images, dim;
    int threads;
};

#define FASTDIFF_DECLARE(isa)        \
    namespace isa {                  \
    void normal(const Normal& call); \
    void q_sample(const QSample& call); \
    void step(const Step& call);     \
    void time_embed(const TimeEmbed& call); \
    }
FASTDIFF_DECLARE(base)
FASTDIFF_DECLARE(v3)
FASTDIFF_DECLARE(v4)

}  // namespace fastdiff
