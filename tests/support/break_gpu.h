#pragma once

#include <memory>

#include "cuda/resources.h"

namespace stillframe::testing {

// Breaks a context when the stream gets there: every call in it fails from then on, for as long as
// the process lives. The kernel is trap.fatbin beside the program.
void break_gpu(const std::shared_ptr<const cuda::Context>& context, CUstream stream);

}  // namespace stillframe::testing
