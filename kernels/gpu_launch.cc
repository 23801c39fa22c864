#include "kernels/gpu_launch.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "kernels/gpu_image.h"

namespace stillframe::kernels {

GpuKernels::GpuKernels(std::shared_ptr<const cuda::Context> context, cuda::Module module,
                       CUfunction pack, CUfunction unpack)
    : context_(std::move(context)), module_(std::move(module)), pack_(pack), unpack_(unpack) {}

Result<GpuKernels> GpuKernels::load(const std::shared_ptr<const cuda::Context>& context) {
  if (gpu_image().empty()) {
    return Error(Code::kUnavailable,
                 "this build of Stillframe has no GPU kernels: it was made without nvcc");
  }
  auto module = cuda::load_module(context, gpu_image());
  if (!module) return std::move(module).error();
  CUfunction functions[2] = {};
  constexpr const char* kNames[2] = {"stillframe_pack", "stillframe_unpack"};
  for (int i = 0; i < 2; ++i) {
    const cuda::Current current(*context);
    auto found = context->driver().check(
        concat("find the kernel ", kNames[i]),
        context->calls().cuModuleGetFunction(&functions[i], module->get(), kNames[i]));
    if (!found) return std::move(found).error();
  }
  return GpuKernels(context, *std::move(module), functions[0], functions[1]);
}

Status GpuKernels::pack(const PackJob& job, std::uint32_t block_count, CUstream stream) const {
  return launch(pack_, job, block_count, stream);
}

Status GpuKernels::unpack(const PackJob& job, std::uint32_t block_count, CUstream stream) const {
  return launch(unpack_, job, block_count, stream);
}

Status GpuKernels::launch(CUfunction function, const PackJob& job, std::uint32_t block_count,
                          CUstream stream) const {
  const cuda::Current current(*context_);
  PackJob argument = job;
  void* arguments[] = {&argument};
  const auto blocks =
      static_cast<unsigned int>(std::min<std::uint64_t>(block_count, job.extent_count));
  return context_->driver().check(
      "launch a kernel", context_->calls().cuLaunchKernel(function, blocks, 1, 1, kBlockThreads, 1,
                                                          1, 0, stream, arguments, nullptr));
}

}  // namespace stillframe::kernels
