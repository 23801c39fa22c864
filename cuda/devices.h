#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/result.h"
#include "cuda/driver.h"

namespace stillframe::cuda {

struct DeviceFacts {
  std::string name;  // "NVIDIA H100 80GB HBM3"
  std::string uuid;  // "GPU-..." as nvidia-smi prints it: the same in every process (GPU-24).
  std::uint64_t bytes = 0;
  int major = 0;  // Of the compute capability.
  int minor = 0;
};

// Every GPU of this process, in the order of its ordinals. Makes no context.
Result<std::vector<DeviceFacts>> list_devices(const Driver& driver);

// Whether a process beside the trainer may have a context on that GPU and share memory with it.
// kUnavailable: not with MIG, nor under MPS, where a fault of one process takes down all (GPU-13,
// GPU-14).
Status may_be_shared(const DeviceFacts& device);

}  // namespace stillframe::cuda
