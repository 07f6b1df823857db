// How kernels are launched: on a device and a stream given as numbers, with errors as C++ exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastdiff {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // what this call left behind is not the next one's
    throw std::runtime_error(std::string("fastdiff's CUDA kernels: ") + what + ": " + cudaGetErrorString(error));
}

// shared: dynamic shared memory in bytes; cluster: blocks that see each other's, 1 for none
template <typename Call>
void launch(void (*kernel)(Call), const Call& call, int64_t blocks, int threads, const Queue& queue, int shared = 0,
            int cluster = 1) {
    check(cudaSetDevice(queue.device), "cudaSetDevice");
    if (shared > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
              "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared, config.stream = static_cast<cudaStream_t>(queue.stream);
    config.attrs = &attribute, config.numAttrs = cluster > 1;
    check(cudaLaunchKernelEx(&config, kernel, call), "cudaLaunchKernelEx");
}

}  // namespace cuda
}  // namespace fastdiff
