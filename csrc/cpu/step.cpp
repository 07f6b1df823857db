// The reverse step of every solver, fastdiff/ops/step.py: one row of numbers applied to the state, tile by tile.
// Sums and products are rounded one by one in the reference's order, so without noise the two agree bit for bit.
#include "pixels.h"

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

// F of a tile that has been split into planes; null where it is still to be read
struct Planes {
    const float *c, *u, *g;
    bool joined;  // x_in is written for all channels together, later

    Planes of(int64_t start) const { return {c ? c + start : c, u ? u + start : u, g ? g + start : g, joined}; }
};

inline const float* read(const Step& call, const Strided& s, int64_t n, int64_t channel, int64_t i, int64_t count,
                         float* buffer) {
    const int64_t origin = n * s.image + channel * s.channel;
    if (s.dtype == FLOAT32 && dense(s, call.channels, call.pixels)) return (const float*)s.data + origin + i;
    stretches(s, call.channels, call.pixels, origin, i, count,
              [&](int64_t offset, int64_t step, int64_t first, int64_t length) {
                  widen(s.data, s.dtype, offset, step, length, buffer + first);
              });
    return buffer;
}

inline void write(const Step& call, const Strided& s, int64_t n, int64_t i, int64_t count, float scale,
                  const float* values) {
    stretches(s, call.channels, call.pixels, n * s.image, i, count,
              [&](int64_t offset, int64_t step, int64_t first, int64_t length) {
                  narrow(scale, values + first, s.data, s.dtype, offset, step, length);
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
const float* prediction(const Step& call, float w, int64_t n, int64_t i, int64_t count, const Planes& planes,
                        float* f, float* u) {
    const float* c = planes.c ? planes.c : read(call, call.F, n, 0, i, count, f);
    if (!call.guided || w == 1) return c;
    const float* other = planes.u ? planes.u : read(call, call.F, n + call.images, 0, i, count, u);
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
                   const float* raw, const Planes& planes, float* z_room, float* g_room, float* scaled) {
    const float* z = call.noise ? call.noise + n * call.channels * call.pixels + i
                                : normals(Stream(*call.seed, *call.k, STREAM_STEP, call.index[n]), i, count, z_room);
    if (call.variance == VARIANCE_NONE) return z;
    const float* g = planes.g ? planes.g : read(call, call.F, n, call.channels, i, count, g_room);
    scale_noise(call, r, x, raw, g, z, count, scaled);
    return scaled;
}

inline bool wants_F(const float* r) { return r[C_OUT] != 0 || r[BF] != 0; }

void tile(const Step& call, const float* r, float c_in, int64_t n, int64_t i, int64_t count, const Planes& planes) {
    // rows that come back to x, x0 or raw behind the sum need room for them; the others work in place
    const bool remembers = r[P] != 0 || r[Q] != 0, comes_back = remembers || call.variance == VARIANCE_MOMENT;
    alignas(64) float f_room[PADDED], u_room[PADDED], raw[PADDED], x0[PADDED], y_room[PADDED], z_room[ROOM];
    const int64_t size = call.channels * call.pixels, offset = n * size + i, slot_size = call.images * size;
    float *x = call.x + offset, *y = comes_back ? y_room : x;
    const float* F = wants_F(r) ? prediction(call, r[W], n, i, count, planes, f_room, u_room) : ZEROS;
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
    if (r[S] != 0) add(r[S], noise(call, r, n, i, count, x, raw, planes, z_room, f_room, u_room), count, y);

    if (remembers) combine(r[P], x, r[Q], x0, count, call.h + (int64_t)r[SLOT] * slot_size + offset);
    if (y != x) __builtin_memcpy(x, y, (size_t)count * sizeof(float));
    // several threads may find the same image broken; they write the same number
    if (call.bad && !finite(x, count) && __atomic_load_n(call.bad + n, __ATOMIC_RELAXED) < 0)
        __atomic_store_n(call.bad + n, *call.k, __ATOMIC_RELAXED);
    if (!call.x_in.data || planes.joined) return;
    write(call, call.x_in, n, i, count, c_in, x);
    if (call.doubled) write(call, call.x_in, n + call.images, i, count, c_in, x);
}

// all channels of a range of pixels: what lies side by side in memory is taken apart, and put together, while it is near
void block(const Step& call, const float* r, float c_in, int64_t n, int64_t p, int64_t count) {
    alignas(64) float c_room[BLOCK], u_room[BLOCK], g_room[BLOCK];
    const int64_t C = call.channels;
    Planes planes{nullptr, nullptr, nullptr, side_by_side(call.x_in, C)};
    if (side_by_side(call.F, C)) {
        const bool wanted = wants_F(r), combined = wanted && call.guided && r[W] != 1;
        if (wanted) planes.c = read_planes(call.F, n, 0, C, p, count, c_room);
        if (combined) planes.u = read_planes(call.F, n + call.images, 0, C, p, count, u_room);
        if (call.variance != VARIANCE_NONE && r[S] != 0) planes.g = read_planes(call.F, n, C, C, p, count, g_room);
    }
    for (int64_t c = 0; c < C; ++c) tile(call, r, c_in, n, c * call.pixels + p, count, planes.of(c * count));
    if (!planes.joined) return;
    const float* x = call.x + n * C * call.pixels + p;
    for (int64_t half = 0; half <= call.doubled; ++half)
        write_planes(call.x_in, n + half * call.images, C, p, count, c_in, x, call.pixels);
}

}  // namespace

void step(const Step& call) {
    const float* r = call.rows + *call.k * COLUMNS;
    const float c_in = call.x_in.data ? r[COLUMNS + C_IN] : 0;
    const int64_t size = call.channels * call.pixels, all = call.images * size;
    const int threads = all <= (r[S] != 0 && !call.noise ? SERIAL_WITH_NOISE : SERIAL) ? 1 : call.threads;
    if (side_by_side(call.F, call.channels) || side_by_side(call.x_in, call.channels))
        return tiles(
            call.images, call.pixels, threads,
            [&](int64_t n, int64_t p, int64_t count) { block(call, r, c_in, n, p, count); },
            block_of(call.channels, call.pixels));
    tiles(call.images, size, threads,
          [&](int64_t n, int64_t i, int64_t count) { tile(call, r, c_in, n, i, count, {}); });
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
