// Sinusoidal features of a time, fastdiff/ops/time_embed.py: sin and cos of scale t f_j, computed in double.
#include "tiles.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

typedef float Half __attribute__((vector_size(FASTDIFF_BYTES / 2)));

constexpr int64_t WIDE = LANES / 2;

inline void store_rounded(float* out, F64 v) {
    const Half rounded = __builtin_convertvector(v, Half);
    __builtin_memcpy(out, &rounded, sizeof rounded);
}

inline void near(double time, const double* f, int64_t count, float* sine, float* cosine) {
    for (int64_t j = 0; j < count; j += WIDE) {
        F64 frequency;
        __builtin_memcpy(&frequency, f + j, sizeof frequency);
        const Pair64 turned = turn(time * frequency);
        store_rounded(sine + j, turned.sine);
        store_rounded(cosine + j, turned.cosine);
    }
}

// thousands of turns, infinite or NaN
void far(double time, const double* f, int64_t count, float* sine, float* cosine) {
    for (int64_t j = 0; j < count; ++j)
        sine[j] = (float)__builtin_sin(time * f[j]), cosine[j] = (float)__builtin_cos(time * f[j]);
}

}  // namespace

void time_embed(const TimeEmbed& call) {
    const int64_t half = call.dim / 2;
    const int threads = call.images * half <= SERIAL_WITH_NOISE ? 1 : call.threads;
    tiles(call.images, half, threads, [&](int64_t n, int64_t i, int64_t count) {
        float sine[TILE], cosine[TILE];
        const double time = call.scale * (call.whole ? (double)((const int64_t*)call.t)[n] : ((const float*)call.t)[n]);
        const double* f = call.frequencies + i;
        const bool fits = __builtin_fabs(time * f[0]) <= FARTHEST && __builtin_fabs(time * f[count - 1]) <= FARTHEST;
        (fits ? near : far)(time, f, count, sine, cosine);
        const int64_t first = n * call.dim + i;
        narrow(1, sine, call.out, call.dtype, first + call.flip * half, 1, count);
        narrow(1, cosine, call.out, call.dtype, first + !call.flip * half, 1, count);
    });
    const float zero = 0;
    for (int64_t n = 0; call.dim % 2 && n < call.images; ++n)
        narrow(1, &zero, call.out, call.dtype, n * call.dim + call.dim - 1, 1, 1);
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
