#pragma once

#include "base/bytes.h"

namespace stillframe::kernels {

// kernels/gpu_kernels.cu as a fatbin for cuModuleLoadData(); empty: this build had no nvcc.
ConstBytes gpu_image() noexcept;

}  // namespace stillframe::kernels
