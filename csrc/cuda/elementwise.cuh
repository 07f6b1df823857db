// One kernel for everything that goes number by number: eight neighbours of one image a thread.
//
// An operation says what happens to them: apply(n, first position, channel, pixel, count). Eight are two Philox blocks,
// and 16 bytes of a 16-bit type.
#pragma once

#include "device.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace fastdiff {
namespace cuda {

constexpr int WIDTH = 8, THREADS = 256;

// VECTORS: all operands are dense and 16-byte accesses stay inside an image. PIXELS: so is the state, while other
// operands are addressed by stride; a thread takes the channels of its eight pixels in turn, which share their cache
// lines in channels_last. NUMBERS: any size, any alignment, any type.
enum Access { VECTORS, PIXELS, NUMBERS };

// x / divisor for x < 2^31, by a product
struct Divider {
    uint32_t divisor;
    uint64_t factor;
    int shift;
};

inline Divider divider(uint32_t divisor) {
    int bits = 0;
    while ((uint64_t(1) << bits) < divisor) ++bits;
    return {divisor, ((uint64_t(1) << (31 + bits)) + divisor - 1) / divisor, 31 + bits};
}

FASTDIFF_DEVICE uint32_t divided(uint32_t x, const Divider& by) { return (uint32_t)(x * by.factor >> by.shift); }

struct Space {
    int64_t first, channels, pixels, size;  // the first image of this launch; size = channels pixels
    Divider units;                          // of an image
    uint32_t all;                           // units of this launch
};

template <Access ACCESS, typename Operation>
FASTDIFF_KERNEL_N(THREADS, 3) elementwise(Operation operation) {
    const Space& space = operation.space;
    const uint32_t unit = blockIdx.x * THREADS + threadIdx.x;
    if (unit >= space.all) return;
    const uint32_t image = divided(unit, space.units);
    const int64_t n = space.first + image, i = (int64_t)(unit - image * space.units.divisor) * WIDTH;
    if constexpr (ACCESS == PIXELS) {
#pragma unroll 1
        for (int64_t c = 0; c < space.channels; ++c) operation.apply(n, c * space.pixels + i, c, i, WIDTH);
    } else if constexpr (ACCESS == VECTORS) {
        operation.apply(n, i, 0, i, WIDTH);
    } else {
        const int64_t left = space.size - i, c = i / space.pixels;
        operation.apply(n, i, c, i - c * space.pixels, left < WIDTH ? (int)left : WIDTH);
    }
}

template <Access ACCESS, typename Operation>
void run_elementwise(Operation operation, int64_t images, int64_t channels, int64_t pixels, const Queue& queue) {
    const int64_t size = channels * pixels, units = ((ACCESS == PIXELS ? pixels : size) + WIDTH - 1) / WIDTH;
    if (images * size == 0) return;
    // units are counted in 31 bits: a larger batch takes several launches
    const int64_t limit = ((int64_t(1) << 31) - 1) / units, at_once = limit < 1 ? 1 : limit;
    for (int64_t first = 0; first < images; first += at_once) {
        const int64_t count = images - first < at_once ? images - first : at_once;
        operation.space = {first, channels, pixels, size, divider((uint32_t)units), (uint32_t)(count * units)};
        const int64_t blocks = (count * units + THREADS - 1) / THREADS;
        launch(elementwise<ACCESS, Operation>, operation, blocks, THREADS, queue);
    }
}

// walks over the elements (c, p) of a strided operand, in the order of positions
struct Walk {
    int64_t at, pixel, next_channel, left, pixels;

    FASTDIFF_DEVICE Walk(const Strided& s, int64_t n, int64_t c, int64_t p, int64_t pixels_)
        : at(n * s.image + c * s.channel + p * s.pixel),
          pixel(s.pixel),
          next_channel(s.channel - (pixels_ - 1) * s.pixel),
          left(pixels_ - p),
          pixels(pixels_) {}

    FASTDIFF_DEVICE void step() {
        at += left == 1 ? next_channel : pixel;
        left = left == 1 ? pixels : left - 1;
    }
};

// eight numbers, dense, aligned to their own size
template <typename T>
FASTDIFF_DEVICE void load_vector(const void* data, int64_t i, float (&v)[WIDTH], T tag) {
    widen(reinterpret_cast<const uint4*>(static_cast<const T*>(data) + i)[0], v, tag);
}
FASTDIFF_DEVICE void load_vector(const void* data, int64_t i, float (&v)[WIDTH], float tag) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + i);
    widen(from[0], v, tag), widen(from[1], v + 4, tag);
}
FASTDIFF_DEVICE void load_vector(const void* data, int64_t i, float (&v)[WIDTH], uint8_t) {
    const uint2 raw = reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(data) + i)[0];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = pixel(raw.x >> 8 * j & 255), v[j + 4] = pixel(raw.y >> 8 * j & 255);
}

template <typename T>
FASTDIFF_DEVICE void store_vector(void* data, int64_t i, const float (&v)[WIDTH], T tag) {
    reinterpret_cast<uint4*>(static_cast<T*>(data) + i)[0] = narrowed(v, tag);
}
FASTDIFF_DEVICE void store_vector(void* data, int64_t i, const float (&v)[WIDTH], float tag) {
    uint4* to = reinterpret_cast<uint4*>(static_cast<float*>(data) + i);
    to[0] = narrowed(v, tag), to[1] = narrowed(v + 4, tag);
}

FASTDIFF_DEVICE void load_vector(const void* data, Dtype dtype, int64_t i, float (&v)[WIDTH]) {
    if (dtype == FLOAT32) return load_vector(data, i, v, float{});
    if (dtype == BFLOAT16) return load_vector(data, i, v, Bfloat{});
    return load_vector(data, i, v, Half{});
}

FASTDIFF_DEVICE void store_vector(void* data, Dtype dtype, int64_t i, const float (&v)[WIDTH]) {
    if (dtype == FLOAT32) return store_vector(data, i, v, float{});
    if (dtype == BFLOAT16) return store_vector(data, i, v, Bfloat{});
    return store_vector(data, i, v, Half{});
}

// count numbers of an operand that is dense like the state
template <Access ACCESS>
FASTDIFF_DEVICE void load_dense(const void* data, Dtype dtype, int64_t i, int count, float (&v)[WIDTH]) {
    if constexpr (ACCESS != NUMBERS) {
        load_vector(data, dtype, i, v);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) v[j] = j < count ? load(data, dtype, i + j) : 0;
    }
}

template <Access ACCESS>
FASTDIFF_DEVICE void store_dense(void* data, Dtype dtype, int64_t i, int count, const float (&v)[WIDTH]) {
    if constexpr (ACCESS != NUMBERS) {
        store_vector(data, dtype, i, v);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
            if (j < count) store(data, dtype, i + j, v[j]);
    }
}

// whether vectors of eight stay aligned in every image of this operand, nothing where it is absent
inline bool aligned(const void* data, Dtype dtype) {
    const int bytes = dtype == UINT8 ? 8 : 16;
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

}  // namespace cuda
}  // namespace fastdiff
