// What csrc/cuda/device.cuh takes from the hardware, in plain C++; approximate functions are exact to rounding here.
#pragma once

#define FASTDIFF_SHARED(name) unsigned char* name = emulated::machine.memory(emulated::machine.current->block)
#define FASTDIFF_DEVICE inline
#define FASTDIFF_DEVICE_AND_HOST inline
#define FASTDIFF_KERNEL(threads) void
#define FASTDIFF_KERNEL_N(threads, blocks) void

namespace fastdiff {
namespace cuda {

FASTDIFF_DEVICE float log2_fast(float x) { return std::log2(x); }
FASTDIFF_DEVICE float exp2_fast(float x) { return std::exp2(x); }
FASTDIFF_DEVICE float sqrt_fast(float x) { return std::sqrt(x); }
FASTDIFF_DEVICE float reciprocal_fast(float x) { return 1 / x; }
FASTDIFF_DEVICE float sin_fast(float x) { return std::sin(x); }
FASTDIFF_DEVICE float cos_fast(float x) { return std::cos(x); }
FASTDIFF_DEVICE float min_nan(float a, float b) { return a != a || a < b ? a : b; }
FASTDIFF_DEVICE float max_nan(float a, float b) { return a != a || a > b ? a : b; }
FASTDIFF_DEVICE uint2 wide_product(uint32_t a, uint32_t b) {
    const uint64_t p = (uint64_t)a * b;
    return {(uint32_t)p, (uint32_t)(p >> 32)};
}
FASTDIFF_DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }

FASTDIFF_DEVICE float as_float(uint32_t word) {
    float v;
    memcpy(&v, &word, 4);
    return v;
}
FASTDIFF_DEVICE float half_as_float(uint32_t word) {
    const uint16_t bits = (uint16_t)word;
    _Float16 v;
    memcpy(&v, &bits, 2);
    return (float)v;
}
FASTDIFF_DEVICE uint32_t float_as_half(float v) {
    const _Float16 narrow = (_Float16)v;
    uint16_t bits;
    memcpy(&bits, &narrow, 2);
    return bits;
}
FASTDIFF_DEVICE uint32_t float_as_bfloat(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
FASTDIFF_DEVICE float2 unpack_half(uint32_t word) { return {half_as_float(word), half_as_float(word >> 16)}; }
FASTDIFF_DEVICE uint32_t pack_half(float a, float b) { return float_as_half(a) | float_as_half(b) << 16; }
FASTDIFF_DEVICE uint32_t pack_bfloat(float a, float b) { return float_as_bfloat(a) | float_as_bfloat(b) << 16; }

FASTDIFF_DEVICE float sum_of_warp(float v) {
    emulated::Machine& m = emulated::machine;
    const unsigned lane = m.current->thread % 32, base = m.current->block * m.threads + m.current->thread - lane;
    for (unsigned offset = 16; offset; offset /= 2) {
        m.shuffled[base + lane] = v;
        m.wait(m.warps[base / 32], 32);
        v += m.shuffled[base + (lane ^ offset)];
        m.wait(m.warps[base / 32], 32);
    }
    return v;
}

FASTDIFF_DEVICE void cluster_arrive() {
    emulated::Machine& m = emulated::machine;
    m.current->cluster_generation = m.cluster.generation;
    if (m.cluster.arrive((int)m.fibers.size())) ++m.progress;
}
FASTDIFF_DEVICE void cluster_wait() {
    emulated::Machine& m = emulated::machine;
    while (m.cluster.generation == m.current->cluster_generation) m.yield();
}
FASTDIFF_DEVICE float cluster_read(const float* mine, int rank) {
    emulated::Machine& m = emulated::machine;
    const unsigned first = (unsigned)rank * m.threads;
    bool alive = false;
    for (unsigned t = 0; t < m.threads; ++t) alive |= !m.fibers[first + t].done;
    if (!alive) throw std::runtime_error("emulated CUDA: a block has left whose shared memory is read");
    const size_t offset = (size_t)((const unsigned char*)mine - m.memory(m.current->block));
    float v;
    memcpy(&v, m.memory((unsigned)rank) + offset, 4);
    return v;
}

}  // namespace cuda
}  // namespace fastdiff
