// As much of the CUDA runtime as fastdiff's kernels use, on a CPU: every thread of a block or a cluster is a fiber.
//
// It executes the kernels' own code: indices, barriers, shuffles, shared and distributed shared memory. It does not
// show: data races that a fixed order of threads hides (two orders are tried), coalescing, the accuracy of the
// hardware's approximate functions, memory ordering, anything about time.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1) : x(x_), y(1), z(1) {}
};
struct float2 {
    float x, y;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrClusterLaunch
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    int ptxVersion;
};

namespace emulated {

struct Barrier {
    int arrived = 0;
    long generation = 0;
    bool arrive(int expected) {
        if (++arrived < expected) return false;
        arrived = 0, ++generation;
        return true;
    }
};

// a context starts a fiber; later it comes and goes by jumps, which ask nothing of the kernel of the operating system
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started;
    unsigned thread, block;  // block: its rank in the cluster
    bool done;
    long cluster_generation;
};

// an H100's, in the order of cudaDeviceAttr
constexpr int DEVICE[] = {132, 232448, 233472, 1};

constexpr size_t STACK = 64 << 10, GUARD = 4096;

struct Machine {
    std::vector<std::vector<char>> stacks;
    std::vector<std::vector<unsigned char>> shared;  // of each block of the cluster, with a guard behind it
    std::vector<Fiber> fibers;
    std::vector<Barrier> blocks, warps;
    std::vector<float> shuffled;
    Barrier cluster;
    jmp_buf scheduler;
    Fiber* current = nullptr;
    unsigned threads = 0, first_block = 0;
    long progress = 0;
    std::string error;
    void (*entry)() = nullptr;

    void yield() {
        if (!_setjmp(current->place)) _longjmp(scheduler, 1);
    }
    __attribute__((noinline)) void resume() {
        if (_setjmp(scheduler)) return;
        if (current->started) _longjmp(current->place, 1);
        current->started = true;
        setcontext(&current->context);
    }
    void wait(Barrier& barrier, int expected) {
        const long before = barrier.generation;
        if (barrier.arrive(expected)) ++progress;
        while (barrier.generation == before) yield();
    }
    unsigned char* memory(unsigned rank) {
        unsigned char* start = shared[rank].data();
        return start + (16 - (uintptr_t)start % 16) % 16;
    }
};

inline Machine machine;

inline void trampoline() {
    try {
        machine.entry();
    } catch (const std::exception& error) {
        machine.error = error.what();  // no exception crosses from one stack to another
    }
    machine.current->done = true;
    ++machine.progress;
    machine.yield();
}

// runs a block until all its threads wait for another block or have ended; how many have not
inline unsigned run_block(unsigned block, bool reversed) {
    Machine& m = machine;
    for (;;) {
        const long before = m.progress;
        unsigned left = 0;
        for (unsigned t = 0; t < m.threads; ++t) {
            Fiber& fiber = m.fibers[block * m.threads + (reversed ? m.threads - 1 - t : t)];
            if (fiber.done) continue;
            m.current = &fiber;
            threadIdx = {fiber.thread, 0, 0}, blockIdx = {m.first_block + fiber.block, 0, 0};
            m.resume();
            left += !fiber.done;
        }
        if (!left || m.progress == before || !m.error.empty()) return left;
    }
}

inline void run_cluster(unsigned first, unsigned count, unsigned threads, size_t bytes, bool reversed) {
    Machine& m = machine;
    const unsigned all = count * threads;
    m.threads = threads, m.first_block = first;
    while (m.stacks.size() < all) m.stacks.emplace_back(STACK);
    m.fibers.assign(all, {});
    m.blocks.assign(count, {}), m.warps.assign(all / 32 + 1, {}), m.shuffled.assign(all, 0);
    m.cluster = {};
    // NaN: what is read before it was written shows
    m.shared.assign(count, std::vector<unsigned char>(bytes + GUARD + 16, 0xff));
    for (unsigned f = 0; f < all; ++f) {
        Fiber& fiber = m.fibers[f];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = m.stacks[f].data(), fiber.context.uc_stack.ss_size = STACK;
        fiber.thread = f % threads, fiber.block = f / threads;
        makecontext(&fiber.context, trampoline, 0);
    }
    // a block runs as far as it can alone, so that what it should have waited for is missing
    for (unsigned left = all; left;) {
        const long before = m.progress;
        left = 0;
        for (unsigned b = 0; b < count; ++b) left += run_block(reversed ? count - 1 - b : b, reversed);
        if (!m.error.empty()) throw std::runtime_error(std::exchange(m.error, {}));
        if (left && m.progress == before) throw std::runtime_error("emulated CUDA: threads wait for ever");
    }
    for (unsigned b = 0; b < count; ++b)
        for (size_t i = 0; i < GUARD; ++i)
            if (m.memory(b)[bytes + i] != 0xff) throw std::runtime_error("emulated CUDA: shared memory overrun");
}

}  // namespace emulated

inline void __syncthreads() {
    emulated::Machine& m = emulated::machine;
    m.wait(m.blocks[m.current->block], (int)m.threads);
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
    *value = emulated::DEVICE[what];
    return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
    return bytes <= emulated::DEVICE[1] ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

template <typename Call>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Call), const Call& call) {
    static void (*running)(Call);
    static const Call* argument;
    running = kernel, argument = &call;
    emulated::machine.entry = [] { running(*argument); };
    const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
    gridDim = config->gridDim;
    const bool fits = config->dynamicSmemBytes <= (size_t)emulated::DEVICE[1] && config->blockDim.x % 32 == 0;
    const bool reversed = getenv("FASTDIFF_EMULATED_REVERSED");
    if (!fits || !gridDim.x || gridDim.x % cluster || cluster > 8) return cudaErrorInvalidValue;
    for (unsigned block = 0; block < gridDim.x; block += cluster)
        emulated::run_cluster(block, cluster, config->blockDim.x, config->dynamicSmemBytes, reversed);
    return cudaSuccess;
}
