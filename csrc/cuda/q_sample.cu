// The forward process and its noise, fastdiff/ops/q_sample.py: x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0.
#include "elementwise.cuh"

namespace fastdiff {
namespace cuda {
namespace {

FASTDIFF_DEVICE Stream stream(const Draw& draw, int64_t n) {
    return {*draw.seed, draw.index[n], (uint32_t)draw.step, draw.stream};
}

// DRAWS: the noise is drawn here and there is no mask
template <Access ACCESS, typename T, bool DRAWS>
struct QSampleOperation {
    QSample call;
    Space space;

    FASTDIFF_DEVICE void read(int64_t i, int count, float (&x0)[WIDTH]) const {
        if constexpr (ACCESS == VECTORS)
            load_vector(call.x0, i, x0, T{});
        else
            load_dense<ACCESS>(call.x0, call.x0_dtype, i, count, x0);
    }

    // outputs have x0's type, fp32 where that is uint8
    FASTDIFF_DEVICE void write(void* to, int64_t i, int count, const float (&v)[WIDTH]) const {
        if constexpr (ACCESS == NUMBERS)
            store_dense<ACCESS>(to, call.dtype, i, count, v);
        else if constexpr (sizeof(T) == 1)
            store_vector(to, i, v, float{});
        else
            store_vector(to, i, v, T{});
    }

    FASTDIFF_DEVICE void apply(int64_t n, int64_t at, int64_t c, int64_t p, int count) const {
        const int64_t i = n * space.size + at, line = 2 * call.t[n];
        const float alpha = call.table[line], sigma = call.table[line + 1];
        float x0[WIDTH], z[WIDTH], out[WIDTH];
        read(i, count, x0);
        if (!DRAWS && call.noise)
            load_dense<ACCESS>(call.noise, call.noise_dtype, i, count, z);
        else
            normals(stream(call.draw, n), (uint32_t)(at / 4), z);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) out[j] = alpha * x0[j] + sigma * z[j];
        if (!DRAWS && call.where.data) keep(n, ACCESS == VECTORS ? at / space.pixels : c, p, count, x0, out);
        write(call.x_t, i, count, out);
        if (call.eps) write(call.eps, i, count, z);
        if (!call.v) return;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) out[j] = alpha * z[j] - sigma * x0[j];
        write(call.v, i, count, out);
    }

    // x0 where the mask is False
    FASTDIFF_DEVICE void keep(int64_t n, int64_t c, int64_t p, int count, const float (&x0)[WIDTH],
                              float (&out)[WIDTH]) const {
        Walk walk(call.where, n, c, ACCESS == VECTORS ? p - c * space.pixels : p, space.pixels);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j, walk.step())
            if (j < count && !static_cast<const uint8_t*>(call.where.data)[walk.at]) out[j] = x0[j];
    }
};

template <Access ACCESS>
struct NormalOperation {
    float* out;
    Draw draw;
    Space space;

    FASTDIFF_DEVICE void apply(int64_t n, int64_t at, int64_t, int64_t, int count) const {
        float z[WIDTH];
        normals(stream(draw, n), (uint32_t)(at / 4), z);
        store_dense<ACCESS>(out, FLOAT32, n * space.size + at, count, z);
    }
};

bool in_vectors(const QSample& call) {
    return call.channels * call.pixels % WIDTH == 0 && aligned(call.x0, call.x0_dtype) &&
           aligned(call.noise, call.noise_dtype) && aligned(call.x_t, call.dtype) && aligned(call.eps, call.dtype) &&
           aligned(call.v, call.dtype);
}

template <Access ACCESS, typename T>
void run(const QSample& call, const Queue& queue) {
    if (ACCESS == NUMBERS || call.noise || call.where.data) {
        const QSampleOperation<ACCESS, T, false> operation{call, {}};
        run_elementwise<ACCESS>(operation, call.images, call.channels, call.pixels, queue);
    } else {
        const QSampleOperation<ACCESS, T, true> operation{call, {}};
        run_elementwise<ACCESS>(operation, call.images, call.channels, call.pixels, queue);
    }
}

}  // namespace

void q_sample(const QSample& call, const Queue& queue) {
    if (!in_vectors(call)) return run<NUMBERS, Any>(call, queue);
    switch (call.x0_dtype) {
        case FLOAT32: return run<VECTORS, float>(call, queue);
        case BFLOAT16: return run<VECTORS, Bfloat>(call, queue);
        case FLOAT16: return run<VECTORS, Half>(call, queue);
        case UINT8: return run<VECTORS, uint8_t>(call, queue);
    }
}

void normal(float* out, const Draw& draw, int64_t images, int64_t size, const Queue& queue) {
    if (size % WIDTH == 0 && aligned(out, FLOAT32))
        run_elementwise<VECTORS>(NormalOperation<VECTORS>{out, draw, {}}, images, 1, size, queue);
    else
        run_elementwise<NUMBERS>(NormalOperation<NUMBERS>{out, draw, {}}, images, 1, size, queue);
}

}  // namespace cuda
}  // namespace fastdiff
