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

}  // namespace stillframe::cuda
