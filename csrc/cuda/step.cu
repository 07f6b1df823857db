// The reverse step of every solver, fastdiff/ops/step.py: one row of numbers applied to the state.
#include "elementwise.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// NaN passes
FASTDIFF_DEVICE float clipped(float v, float bound) { return max_nan(min_nan(v, bound), -bound); }

// y = coefficient * operand; 0 * NaN is 0 here
FASTDIFF_DEVICE void set_term(float coefficient, const float (&operand)[WIDTH], float (&y)[WIDTH]) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) y[j] = 0;
    if (coefficient == 0) return;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) y[j] = coefficient * operand[j];
}

// y += coefficient * operand
FASTDIFF_DEVICE void add_term(float coefficient, const float (&operand)[WIDTH], float (&y)[WIDTH]) {
    if (coefficient == 0) return;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) y[j] = fused(coefficient, operand[j], y[j]);
}

template <Access ACCESS, typename T, bool VARIES>
struct StepOperation {
    Step call;
    Space space;

    // this row, and the next one behind it; from memory, where every thread finds it in the cache
    FASTDIFF_DEVICE const float* row() const { return call.rows + *call.k * COLUMNS; }

    // of the network's output; c counts from its first channel
    FASTDIFF_DEVICE void read(int64_t n, int64_t c, int64_t p, int count, float (&v)[WIDTH]) const {
        if constexpr (ACCESS == VECTORS) {
            load_vector(call.F.data, n * call.F.image + c * call.F.channel + p, v, T{});
        } else {
            Walk walk(call.F, n, c, p, space.pixels);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j, walk.step()) v[j] = j < count ? load(call.F.data, walk.at, T{}) : 0;
        }
    }

    FASTDIFF_DEVICE void write(int64_t n, int64_t c, int64_t p, int count, const float (&v)[WIDTH]) const {
        if constexpr (ACCESS == VECTORS) {
            store_vector(call.x_in.data, call.x_in.dtype, n * call.x_in.image + c * call.x_in.channel + p, v);
        } else {
            Walk walk(call.x_in, n, c, p, space.pixels);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j, walk.step())
                if (j < count) store(call.x_in.data, call.x_in.dtype, walk.at, v[j]);
        }
    }

    // F_u + W (F_c - F_u)
    FASTDIFF_DEVICE void predict(int64_t n, int64_t c, int64_t p, int count, float (&f)[WIDTH]) const {
        read(n, c, p, count, f);
        if (!call.guided) return;
        const float w = row()[W];
        if (w == 1) return;
        float u[WIDTH];
        read(n + call.images, c, p, count, u);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) f[j] = u[j] + w * (f[j] - u[j]);
    }

    // y += S sqrt(s2) z
    FASTDIFF_DEVICE void add_noise(int64_t n, int64_t at, int64_t c, int64_t p, int count, const float (&x)[WIDTH],
                                   const float (&raw)[WIDTH], float (&y)[WIDTH]) const {
        const float* r = row();
        float z[WIDTH];
        if (call.noise)
            load_dense<ACCESS>(call.noise, FLOAT32, n * space.size + at, count, z);
        else
            normals({*call.seed, call.index[n], (uint32_t)*call.k, STREAM_STEP}, (uint32_t)(at / 4), z);
        if (VARIES) {
            float g[WIDTH];
            read(n, c + space.channels, p, count, g);
            const float inverse = 1 / r[SIGMA];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float eps = (x[j] - r[ALPHA] * raw[j]) * inverse;
                const float moment = r[V0] + r[V1] * g[j] + r[V2] * (eps * eps);
                const float log_s = 0.5f * (r[V0] + (g[j] + 1) * 0.5f * (r[V1] - r[V0]));
                z[j] *= call.variance == VARIANCE_RANGE ? exp2_fast(log_s * 1.44269504f)
                                                        : sqrt_fast(min_nan(max_nan(moment, r[V0]), r[V3]));
            }
        }
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) y[j] = fused(r[S], z[j], y[j]);
    }

    FASTDIFF_DEVICE void remember(int64_t i, int count, const float (&x)[WIDTH], const float (&x0)[WIDTH]) const {
        const float* r = row();
        if (r[P] == 0 && r[Q] == 0) return;
        float h[WIDTH];
        set_term(r[P], x, h);
        add_term(r[Q], x0, h);
        store_dense<ACCESS>(call.h, FLOAT32, (int64_t)r[SLOT] * call.images * space.size + i, count, h);
    }

    FASTDIFF_DEVICE void apply(int64_t n, int64_t at, int64_t c, int64_t p, int count) const {
        const float* r = row();
        const int64_t i = n * space.size + at, slot = call.images * space.size;
        const bool needs_x = r[C_SKIP] != 0 || r[A] != 0 || r[P] != 0 ||
                             (VARIES && call.variance == VARIANCE_MOMENT && r[S] != 0);
        float x[WIDTH] = {}, F[WIDTH] = {}, raw[WIDTH], x0[WIDTH], y[WIDTH];
        if (needs_x) load_dense<ACCESS>(call.x, FLOAT32, i, count, x);
        if (r[C_OUT] != 0 || r[BF] != 0) predict(n, c, p, count, F);
        set_term(r[C_SKIP], x, raw);
        add_term(r[C_OUT], F, raw);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) x0[j] = clipped(raw[j], r[CLIP]);
        set_term(r[A], x, y);
        add_term(r[B0], x0, y);
        // what few rows have, behind one branch: each by itself would be issued, and predicated off, in every row
        if (r[BF] != 0 || r[B1] != 0 || r[B2] != 0 || r[B3] != 0) {
            add_term(r[BF], F, y);
            for (int b = 0; b < 3; ++b)
                if (r[B1 + b] != 0) {
                    float h[WIDTH];
                    load_dense<ACCESS>(call.h, FLOAT32, b * slot + i, count, h);
                    add_term(r[B1 + b], h, y);
                }
        }
        if (r[S] != 0) add_noise(n, at, c, p, count, x, raw, y);
        remember(i, count, x, x0);
        store_dense<ACCESS>(call.x, FLOAT32, i, count, y);
        if (call.bad) report(n, count, y);
        if (!call.x_in.data) return;
        const float c_in = r[COLUMNS + C_IN];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) y[j] *= c_in;
        write(n, c, p, count, y);
        if (call.doubled) write(n + call.images, c, p, count, y);
    }

    // several threads may find the same image broken; they write the same number
    FASTDIFF_DEVICE void report(int64_t n, int count, const float (&y)[WIDTH]) const {
        float zero = 0;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) zero = j < count ? fused(y[j], 0.0f, zero) : zero;
        if (zero != 0 && call.bad[n] < 0) call.bad[n] = *call.k;
    }
};

template <Access ACCESS, typename T, bool VARIES>
void run(const Step& call, const Queue& queue) {
    using Operation = StepOperation<ACCESS, T, VARIES>;
    run_elementwise<ACCESS>(Operation{call, {}}, call.images, call.channels, call.pixels, queue);
}

template <Access ACCESS, typename T>
void run(const Step& call, const Queue& queue) {
    call.variance == VARIANCE_NONE ? run<ACCESS, T, false>(call, queue) : run<ACCESS, T, true>(call, queue);
}

template <Access ACCESS>
void run(const Step& call, const Queue& queue) {
    if (call.F.dtype == FLOAT32) return run<ACCESS, float>(call, queue);
    if (call.F.dtype == BFLOAT16) return run<ACCESS, Bfloat>(call, queue);
    run<ACCESS, Half>(call, queue);
}

// images of this operand are dense, and vectors of eight stay aligned in each of them
bool in_vectors(const Step& call, const Strided& s) {
    return !s.data || (aligned(s.data, s.dtype) && s.image % WIDTH == 0 && (s.pixel == 1 || call.pixels == 1) &&
                       (s.channel == call.pixels || call.channels == 1));
}

}  // namespace

void step(const Step& call, const Queue& queue) {
    const int64_t size = call.channels * call.pixels;
    const bool state = size % WIDTH == 0 && aligned(call.x, FLOAT32) && aligned(call.h, FLOAT32) &&
                       aligned(call.noise, FLOAT32);
    if (state && in_vectors(call, call.F) && in_vectors(call, call.x_in)) return run<VECTORS>(call, queue);
    if (state && call.pixels % WIDTH == 0) return run<PIXELS>(call, queue);
    run<NUMBERS>(call, queue);
}

}  // namespace cuda
}  // namespace fastdiff
