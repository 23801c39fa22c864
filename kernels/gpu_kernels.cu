// The kernels as a driver launches them, by name and with one struct, in blocks of kBlockThreads.
// Built into a fatbin for each architecture; see cmake/GpuKernels.cmake.
#include "kernels/gpu_block.cuh"
#include "kernels/pack.h"

namespace kernels = stillframe::kernels;

extern "C" __global__ void __launch_bounds__(kernels::kBlockThreads)
    stillframe_pack(const kernels::PackJob job) {
  __shared__ alignas(16) std::byte shared[kernels::kSharedBytes];
  kernels::GpuBlock block(shared);
  kernels::pack(block, job);
}

extern "C" __global__ void __launch_bounds__(kernels::kBlockThreads)
    stillframe_unpack(const kernels::PackJob job) {
  __shared__ alignas(16) std::byte shared[kernels::kSharedBytes];
  kernels::GpuBlock block(shared);
  kernels::unpack(block, job);
}
