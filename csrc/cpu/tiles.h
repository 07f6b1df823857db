// How a kernel walks over images: tiles that stay in the first-level cache, shared out to OpenMP's threads.
#pragma once

#include "convert.h"
#include "noise.h"
#include "sizes.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// floats that one thread finishes in less time than it takes to wake a second one
constexpr int64_t SERIAL = 16384, SERIAL_WITH_NOISE = 4096;

constexpr int64_t ROOM = noise_room((int)TILE);

// body(image, first, count) for all tiles, `length` long at most, of images x size
template <typename Body>
inline void tiles(int64_t images, int64_t size, int threads, const Body& body, int64_t length = TILE) {
    const int64_t each = (size + length - 1) / length, all = images * each;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < all; ++task) {
        const int64_t first = task % each * length;
        body(task / each, first, smaller(length, size - first));
    }
}

inline bool dense(const Strided& s, int64_t channels, int64_t pixels) {
    return (s.pixel == 1 || pixels == 1) && (s.channel == pixels || channels == 1);
}

// body(offset in s, step, first number of the tile, count) for each stretch of one channel, or for all of a dense tensor
template <typename Body>
inline void stretches(const Strided& s, int64_t channels, int64_t pixels, int64_t origin, int64_t i, int64_t count,
                      const Body& body) {
    if (dense(s, channels, pixels)) return body(origin + i, 1, 0, count);
    for (int64_t done = 0; done < count;) {
        const int64_t c = (i + done) / pixels, p = (i + done) % pixels;
        const int64_t length = smaller(pixels - p, count - done);
        body(origin + c * s.channel + p * s.pixel, s.pixel, done, length);
        done += length;
    }
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
