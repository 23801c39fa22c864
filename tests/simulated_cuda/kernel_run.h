#pragma once

#include <cstdint>
#include <random>

#include "kernels/pack.h"
#include "tests/simulated_cuda/machine.h"

namespace stillframe::simulated_cuda {

enum class Kernel { kPack, kUnpack, kCopy, kTrap };

// One launch on a GPU: every block of it, in a random order, as kernels/gpu_kernels.cu would.
void run_kernel(Memory& memory, int ordinal, Kernel kernel, const kernels::PackJob& job,
                std::uint64_t blocks, std::mt19937_64& random);

}  // namespace stillframe::simulated_cuda
