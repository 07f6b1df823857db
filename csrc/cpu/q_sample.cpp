// The forward process and its noise, fastdiff/ops/q_sample.py: x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0.
#include "tiles.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// where the numbers of a tile are made, and how they get from there to the output
struct Target {
    void* out;
    Dtype dtype;
    int64_t offset, count;
    float* buffer;

    float* floats() const { return dtype == FLOAT32 ? (float*)out + offset : buffer; }

    void finish() const {
        if (dtype != FLOAT32) narrow(1, buffer, out, dtype, offset, 1, count);
    }
};

// p a + q b
inline void blend(float p, const float* a, float q, const float* b, int64_t count, float* __restrict out) {
    for (int64_t j = 0; j < count; ++j) out[j] = p * a[j] + q * b[j];
}

// x0 again where the mask is false
void unmask(const QSample& call, int64_t n, int64_t i, int64_t count, const float* x0, float* x_t) {
    const Strided& mask = call.where;
    stretches(mask, call.channels, call.pixels, n * mask.image, i, count,
              [&](int64_t offset, int64_t step, int64_t first, int64_t length) {
                  const uint8_t* noised = (const uint8_t*)mask.data + offset;
                  uint8_t room[TILE];
                  if (step != 1) {
                      for (int64_t j = 0; j < length; ++j) room[j] = noised[j * step];
                      noised = room;
                  }
#pragma GCC ivdep
                  for (int64_t j = first; j < first + length; ++j) x_t[j] = noised[j - first] ? x_t[j] : x0[j];
              });
}

void tile(const QSample& call, int64_t n, int64_t i, int64_t count) {
    alignas(64) float x_room[TILE], z_room[ROOM], out_room[TILE];
    const int64_t offset = n * call.channels * call.pixels + i;
    const float alpha = call.table[2 * call.t[n]], sigma = call.table[2 * call.t[n] + 1];
    const float* x0 = floats(call.x0, call.x0_dtype, offset, count, x_room);
    const float* z;
    if (call.noise)
        z = floats(call.noise, call.noise_dtype, offset, count, z_room);
    else
        z = normals(Stream(*call.seed, call.step, call.stream, call.index[n]), i, count, z_room);

    const Target x_t{call.x_t, call.dtype, offset, count, out_room};
    blend(alpha, x0, sigma, z, count, x_t.floats());
    if (call.where.data) unmask(call, n, i, count, x0, x_t.floats());
    x_t.finish();
    if (call.eps) narrow(1, z, call.eps, call.dtype, offset, 1, count);
    if (call.v) {
        const Target v{call.v, call.dtype, offset, count, out_room};
        blend(alpha, z, -sigma, x0, count, v.floats());
        v.finish();
    }
}

}  // namespace

void q_sample(const QSample& call) {
    const int64_t size = call.channels * call.pixels, all = call.images * size;
    const int threads = all <= (call.noise ? SERIAL : SERIAL_WITH_NOISE) ? 1 : call.threads;
    tiles(call.images, size, threads, [&](int64_t n, int64_t i, int64_t count) { tile(call, n, i, count); });
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
