// Tensors whose pixels hold their channels side by side: to one plane of floats a channel, and back.
#pragma once

#include "tiles.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// numbers of a block of pixels, and the most channels that one has
constexpr int64_t BLOCK = 3072, MOST_CHANNELS = 64;

inline bool side_by_side(const Strided& s, int64_t channels) {
    return s.data && s.channel == 1 && s.pixel >= channels && channels > 1 && channels <= MOST_CHANNELS;
}

// Pixels of a block: about equal parts of an image, in whole batches of noise where there is room for one. Never a whole
// tile, for planes whole pages apart would compete for the same lines of the cache.
inline int64_t block_of(int64_t channels, int64_t pixels) {
    const int64_t room = BLOCK / channels, unit = room >= 128 ? 128 : 16;
    const int64_t most = smaller(TILE - unit, room / unit * unit), blocks = (pixels + most - 1) / most;
    return blocks ? ((pixels + blocks - 1) / blocks + unit - 1) / unit * unit : unit;
}

// A fixed number of channels lets the compiler shuffle whole vectors; 0 stands for any.
template <int FIXED>
inline void split(const float* __restrict in, int64_t any, int64_t count, float* __restrict out) {
    const int64_t channels = FIXED ? FIXED : any;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 16
        for (int64_t c = 0; c < channels; ++c) out[c * count + j] = in[j * channels + c];
}

template <int FIXED>
inline void join(float scale, const float* __restrict in, int64_t plane, int64_t any, int64_t count,
                 float* __restrict out) {
    const int64_t channels = FIXED ? FIXED : any;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 16
        for (int64_t c = 0; c < channels; ++c) out[j * channels + c] = scale * in[c * plane + j];
}

inline void split(const float* in, int64_t channels, int64_t count, float* out) {
    if (channels == 3) return split<3>(in, 3, count, out);
    if (channels == 4) return split<4>(in, 4, count, out);
    if (channels == 16) return split<16>(in, 16, count, out);
    split<0>(in, channels, count, out);
}

inline void join(float scale, const float* in, int64_t plane, int64_t channels, int64_t count, float* out) {
    if (channels == 3) return join<3>(scale, in, plane, 3, count, out);
    if (channels == 4) return join<4>(scale, in, plane, 4, count, out);
    if (channels == 16) return join<16>(scale, in, plane, 16, count, out);
    join<0>(scale, in, plane, channels, count, out);
}

// the first bytes of count pixels from one distance to another; what lies between is not touched
template <int FIXED>
inline void repack(const char* from, int64_t step, char* to, int64_t to_step, int64_t any, int64_t count) {
    for (int64_t j = 0; j < count; ++j)
        __builtin_memcpy(to + j * to_step, from + j * step, (size_t)(FIXED ? FIXED : any));
}

inline void repack(const char* from, int64_t step, char* to, int64_t to_step, int64_t bytes, int64_t count) {
    if (bytes == 6) return repack<6>(from, step, to, to_step, 6, count);
    if (bytes == 8) return repack<8>(from, step, to, to_step, 8, count);
    if (bytes == 12) return repack<12>(from, step, to, to_step, 12, count);
    if (bytes == 16) return repack<16>(from, step, to, to_step, 16, count);
    repack<0>(from, step, to, to_step, bytes, count);
}

// `channels` planes, count apart, of the pixels from p on
inline const float* read_planes(const Strided& s, int64_t n, int64_t first, int64_t channels, int64_t p,
                                int64_t count, float* out) {
    alignas(64) float wide[BLOCK];
    alignas(64) char packed[BLOCK * sizeof(float)];
    const int64_t bytes = width(s.dtype), offset = n * s.image + first + p * s.pixel;
    const char* from = (const char*)s.data + offset * bytes;
    if (s.pixel != channels) {
        repack(from, s.pixel * bytes, packed, channels * bytes, channels * bytes, count);
        from = packed;
    }
    split(floats(from, s.dtype, 0, channels * count, wide), channels, count, out);
    return out;
}

// scale times planes that lie `plane` apart; channels of s beyond them keep what they hold
inline void write_planes(const Strided& s, int64_t n, int64_t channels, int64_t p, int64_t count, float scale,
                         const float* in, int64_t plane) {
    alignas(64) float wide[BLOCK];
    alignas(64) char packed[BLOCK * sizeof(float)];
    const int64_t bytes = width(s.dtype);
    char* to = (char*)s.data + (n * s.image + p * s.pixel) * bytes;
    if (s.pixel == channels && s.dtype == FLOAT32) return join(scale, in, plane, channels, count, (float*)to);
    join(scale, in, plane, channels, count, wide);
    if (s.pixel == channels) return narrow(1, wide, to, s.dtype, 0, 1, channels * count);
    if (s.dtype != FLOAT32) narrow(1, wide, packed, s.dtype, 0, 1, channels * count);
    repack(s.dtype == FLOAT32 ? (const char*)wide : packed, channels * bytes, to, s.pixel * bytes, channels * bytes, count);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
