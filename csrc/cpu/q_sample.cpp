// The forward process and its noise, fastdiff/ops/q_sample.py: x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0.
#include "tiles.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// where a kernel writes floats: the output itself when it is fp32, else a buffer that finish() converts
inline float* target(void* out, Dtype dtype, int64_t offset, float* buffer) {
    return dtype == FLOAT32 ? (float*)out + offset : buffer;
}

inline void finish(const float* from, void* out, Dtype dtype, int64_t offset, int64_t count) {
    if (dtype != FLOAT32) narrow(1, from, out, dtype, offset, 1, count);
}

// p a + q b
inline void blend(float p, const float* a, float q, const float* b, int64_t count, float* __restrict out) {
    for (int64_t j = 0; j < count; ++j) out[j] = p * a[j] + q * b[j];
}

void tile(const QSample& call, int64_t n, int64_t i, int64_t count) {
    alignas(64) float x_room[TILE], z_room[ROOM], out_room[TILE];
    const int64_t offset = n * call.size + i;
    const float alpha = call.table[2 * call.t[n]], sigma = call.table[2 * call.t[n] + 1];
    const float* x0 = floats(call.x0, call.x0_dtype, offset, count, x_room);
    const float* z;
    if (call.noise)
        z = floats(call.noise, call.noise_dtype, offset, count, z_room);
    else
        z = normals(Stream(*call.seed, call.step, call.stream, call.index[n]), i, count, z_room);

    float* x_t = target(call.x_t, call.dtype, offset, out_room);
    blend(alpha, x0, sigma, z, count, x_t);
    finish(x_t, call.x_t, call.dtype, offset, count);
    if (call.eps) narrow(1, z, call.eps, call.dtype, offset, 1, count);
    if (call.v) {
        float* v = target(call.v, call.dtype, offset, out_room);
        blend(alpha, z, -sigma, x0, count, v);
        finish(v, call.v, call.dtype, offset, count);
    }
}

}  // namespace

void q_sample(const QSample& call) {
    const int64_t serial = call.noise ? SERIAL : SERIAL_WITH_NOISE;
    const int threads = call.images * call.size <= serial ? 1 : call.threads;
    tiles(call.images, call.size, threads,
          [&](int64_t n, int64_t i, int64_t count) { tile(call, n, i, count); });
}

void normal(const Normal& call) {
    const int threads = call.images * call.size <= SERIAL_WITH_NOISE ? 1 : call.threads;
    tiles(call.images, call.size, threads, [&](int64_t n, int64_t i, int64_t count) {
        alignas(64) float room[ROOM];
        const float* z = normals(Stream(*call.seed, call.step, call.stream, call.index[n]), i, count, room);
        __builtin_memcpy(call.out + n * call.size + i, z, (size_t)count * sizeof(float));
    });
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
