// How a kernel walks over images: tiles that stay in the first-level cache, shared out to OpenMP's threads.
#pragma once

#include "convert.h"
#include "noise.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// floats that one thread finishes in less time than it takes to wake a second one
constexpr int64_t SERIAL = 16384, SERIAL_WITH_NOISE = 4096;

constexpr int64_t ROOM = noise_room((int)TILE);

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// body(image, first, count) for all tiles of images x size
template <typename Body>
inline void tiles(int64_t images, int64_t size, int threads, const Body& body) {
    const int64_t each = (size + TILE - 1) / TILE, all = images * each;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < all; ++task) {
        const int64_t first = task % each * TILE;
        body(task / each, first, smaller(TILE, size - first));
    }
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
