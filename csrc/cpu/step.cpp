// The reverse step of every solver, fastdiff/ops/step.py: one row of numbers applied to the state, tile by tile.
// Sums and products are rounded one by one in the reference's order, so without noise the two agree bit for bit.
#include "tiles.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// read in place of an operand whose coefficient is zero: 0 * 0, whatever lies in the operand
alignas(64) const float ZEROS[TILE] = {};

// arrays whole pages apart would compete for the same lines of the cache
constexpr int64_t PADDED = TILE + 48;

inline const float* unless_zero(float coefficient, const float* operand) {
    return coefficient != 0 ? operand : ZEROS;
}

inline bool dense(const Step& call, const Strided& s) {
    return (s.pixel == 1 || call.pixels == 1) && (s.channel == call.pixels || call.channels == 1);
}

// calls body(offset in the tensor, first float of the tile, count) for each stretch of one channel
template <typename Body>
inline void stretches(const Step& call, const Strided& s, int64_t n, int64_t channel, int64_t i, int64_t count,
                      const Body& body) {
    const int64_t origin = n * s.image + channel * s.channel;
    if (dense(call, s)) return body(origin + i, 0, count);
    for (int64_t done = 0; done < count;) {
        const int64_t c = (i + done) / call.pixels, p = (i + done) % call.pixels;
        const int64_t length = smaller(call.pixels - p, count - done);
        body(origin + c * s.channel + p * s.pixel, done, length);
        done += length;
    }
}

inline const float* read(const Step& call, const Strided& s, int64_t n, int64_t channel, int64_t i, int64_t count,
                         float* buffer) {
    if (s.dtype == FLOAT32 && dense(call, s)) return (const float*)s.data + n * s.image + channel * s.channel + i;
    const int64_t stride = dense(call, s) ? 1 : s.pixel;
    stretches(call, s, n, channel, i, count, [&](int64_t offset, int64_t first, int64_t length) {
        widen(s.data, s.dtype, offset, stride, length, buffer + first);
    });
    return buffer;
}

inline void write(const Step& call, const Strided& s, int64_t n, int64_t i, int64_t count, float scale,
                  const float* values) {
    const int64_t stride = dense(call, s) ? 1 : s.pixel;
    stretches(call, s, n, 0, i, count, [&](int64_t offset, int64_t first, int64_t length) {
        narrow(scale, values + first, s.data, s.dtype, offset, stride, length);
    });
}

// p a + q b; out may be a or b
inline void combine(float p, const float* a, float q, const float* b, int64_t count, float* out) {
    a = unless_zero(p, a), b = unless_zero(q, b);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) out[j] = p * a[j] + q * b[j];
}

inline void add(float b, const float* operand, int64_t count, float* y) {
    if (b == 0) return;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) y[j] += b * operand[j];
}

// comparisons with NaN are false, so NaN passes
inline float clipped(float v, float bound) {
    v = bound < v ? bound : v;
    return v < -bound ? -bound : v;
}

// y = A x + B0 x0 in one pass over x and F; y may be x. raw and x0 are stored for those rows that come back to them.
template <bool STORE>
inline void advance(const float* r, const float* x, const float* F, int64_t count, float* raw, float* x0, float* y) {
    const float c_skip = r[C_SKIP], c_out = r[C_OUT], bound = r[CLIP], a = r[A], b0 = r[B0];
    const float *skipped = unless_zero(c_skip, x), *kept = unless_zero(a, x);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
        const float image = c_skip * skipped[j] + c_out * F[j], bounded = clipped(image, bound);
        if (STORE) raw[j] = image, x0[j] = bounded;
        y[j] = a * kept[j] + b0 * bounded;
    }
}

// F_u + W (F_c - F_u)
const float* prediction(const Step& call, float w, int64_t n, int64_t i, int64_t count, float* f, float* u) {
    const float* c = read(call, call.F, n, 0, i, count, f);
    if (!call.guided || w == 1) return c;
    const float* other = read(call, call.F, n + call.images, 0, i, count, u);
    for (int64_t j = 0; j < count; ++j) f[j] = other[j] + w * (c[j] - other[j]);
    return f;
}

// z * sqrt(s2), in place in `scaled`, whose size is a multiple of LANES
void scale_noise(const Step& call, const float* r, const float* x, const float* raw, const float* g, const float* z,
                 int64_t count, float* __restrict scaled) {
    if (call.variance == VARIANCE_RANGE) {
        for (int64_t j = 0; j < count; ++j) scaled[j] = 0.5f * (r[V0] + (g[j] + 1) * 0.5f * (r[V1] - r[V0]));
        for (int64_t j = count; j % LANES; ++j) scaled[j] = 0;
        for (int64_t j = 0; j < count; j += LANES) store(scaled + j, exponential(load(scaled + j)));
    } else {
        for (int64_t j = 0; j < count; ++j) {
            const float eps = (x[j] - r[ALPHA] * raw[j]) / r[SIGMA];
            float s2 = r[V0] + r[V1] * g[j] + r[V2] * (eps * eps);
            s2 = s2 < r[V0] ? r[V0] : s2;
            scaled[j] = __builtin_sqrtf(s2 > r[V3] ? r[V3] : s2);
        }
    }
    for (int64_t j = 0; j < count; ++j) scaled[j] *= z[j];
}

inline bool finite(const float* y, int64_t count) {
    int32_t largest = 0;
    for (int64_t j = 0; j < count; ++j) {
        const int32_t magnitude = (int32_t)(bits(y[j]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest < 0x7f800000;
}

const float* noise(const Step& call, const float* r, int64_t n, int64_t i, int64_t count, const float* x,
                   const float* raw, float* z_room, float* g_room, float* scaled) {
    const float* z = call.noise ? call.noise + n * call.channels * call.pixels + i
                                : normals(Stream(*call.seed, *call.k, STREAM_STEP, call.index[n]), i, count, z_room);
    if (call.variance == VARIANCE_NONE) return z;
    const float* g = read(call, call.F, n, call.channels, i, count, g_room);
    scale_noise(call, r, x, raw, g, z, count, scaled);
    return scaled;
}

void tile(const Step& call, const float* r, float c_in, int64_t n, int64_t i, int64_t count) {
    // rows that come back to x, x0 or raw behind the sum need room for them; the others work in place
    const bool remembers = r[P] != 0 || r[Q] != 0, comes_back = remembers || call.variance == VARIANCE_MOMENT;
    alignas(64) float f_room[PADDED], u_room[PADDED], raw[PADDED], x0[PADDED], y_room[PADDED], z_room[ROOM];
    const int64_t size = call.channels * call.pixels, offset = n * size + i, slot_size = call.images * size;
    float *x = call.x + offset, *y = comes_back ? y_room : x;
    const bool wants_F = r[C_OUT] != 0 || r[BF] != 0;
    const float* F = wants_F ? prediction(call, r[W], n, i, count, f_room, u_room) : ZEROS;
    const float* F_of_x0 = unless_zero(r[C_OUT], F);

    if (comes_back || r[B0] == 0) {
        advance<true>(r, x, F_of_x0, count, raw, x0, y_room);
        if (r[B0] == 0) combine(r[A], x, 0, x0, count, y);
    } else {
        advance<false>(r, x, F_of_x0, count, raw, x0, y);
    }
    add(r[BF], F, count, y);
    for (int slot = 0; slot < 3; ++slot) add(r[B1 + slot], call.h + slot * slot_size + offset, count, y);
    // F has been used: its buffers serve the second output and the scaled noise
    if (r[S] != 0) add(r[S], noise(call, r, n, i, count, x, raw, z_room, f_room, u_room), count, y);

    if (remembers) combine(r[P], x, r[Q], x0, count, call.h + (int64_t)r[SLOT] * slot_size + offset);
    if (y != x) __builtin_memcpy(x, y, (size_t)count * sizeof(float));
    // several threads may find the same image broken; they write the same number
    if (call.bad && !finite(x, count) && __atomic_load_n(call.bad + n, __ATOMIC_RELAXED) < 0)
        __atomic_store_n(call.bad + n, *call.k, __ATOMIC_RELAXED);
    if (!call.x_in.data) return;
    write(call, call.x_in, n, i, count, c_in, x);
    if (call.doubled) write(call, call.x_in, n + call.images, i, count, c_in, x);
}

}  // namespace

void step(const Step& call) {
    const float* r = call.rows + *call.k * COLUMNS;
    const float c_in = call.x_in.data ? r[COLUMNS + C_IN] : 0;
    const int64_t size = call.channels * call.pixels, all = call.images * size;
    const int threads = all <= (r[S] != 0 && !call.noise ? SERIAL_WITH_NOISE : SERIAL) ? 1 : call.threads;
    const bool whole = dense(call, call.F) && (!call.x_in.data || dense(call, call.x_in));
    if (whole || call.pixels < 256) {
        tiles(call.images, size, threads,
              [&](int64_t n, int64_t i, int64_t count) { tile(call, r, c_in, n, i, count); });
    } else {
        // all channels of a range of pixels together: what lies side by side in memory is used while it is near
        tiles(call.images, call.pixels, threads, [&](int64_t n, int64_t p, int64_t count) {
            for (int64_t c = 0; c < call.channels; ++c) tile(call, r, c_in, n, c * call.pixels + p, count);
        });
    }
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
