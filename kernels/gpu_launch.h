#pragma once

#include <cstdint>
#include <memory>

#include "base/result.h"
#include "cuda/resources.h"
#include "kernels/pack.h"

namespace stillframe::kernels {

// The kernels of gpu_kernels.cu in one context.
class GpuKernels {
 public:
  // kUnavailable: this build has none, or none for that GPU.
  static Result<GpuKernels> load(const std::shared_ptr<const cuda::Context>& context);

  // Enqueues one launch of at most `block_count` blocks, which uses `job` and what it points to
  // until it has ended.
  Status pack(const PackJob& job, std::uint32_t block_count, CUstream stream) const;
  Status unpack(const PackJob& job, std::uint32_t block_count, CUstream stream) const;

 private:
  GpuKernels(std::shared_ptr<const cuda::Context> context, cuda::Module module, CUfunction pack,
             CUfunction unpack);
  Status launch(CUfunction function, const PackJob& job, std::uint32_t block_count,
                CUstream stream) const;

  std::shared_ptr<const cuda::Context> context_;
  cuda::Module module_;
  CUfunction pack_;
  CUfunction unpack_;
};

}  // namespace stillframe::kernels
