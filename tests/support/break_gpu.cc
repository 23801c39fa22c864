#include "tests/support/break_gpu.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "base/check.h"

namespace stillframe::testing {

void break_gpu(const std::shared_ptr<const cuda::Context>& context, CUstream stream) {
  const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  std::ifstream file(folder / "trap.fatbin", std::ios::binary);
  const std::string image((std::istreambuf_iterator<char>(file)), {});
  check(!image.empty(), "trap.fatbin lies beside the program");
  auto module = cuda::load_module(context, std::as_bytes(std::span(image)));
  check(module.has_value(), "the GPU takes the kernel");
  const cuda::Current current(*context);
  CUfunction trap = nullptr;
  check(context->calls().cuModuleGetFunction(&trap, module->get(), "trap") == CUDA_SUCCESS,
        "the kernel has its name");
  check(context->calls().cuLaunchKernel(trap, 1, 1, 1, 1, 1, 1, 0, stream, nullptr, nullptr) ==
            CUDA_SUCCESS,
        "the GPU is not broken yet");
  // It is in use until the context is broken, and cannot be ended then.
  (void)new (std::nothrow) cuda::Module(*std::move(module));
}

}  // namespace stillframe::testing
