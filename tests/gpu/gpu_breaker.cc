// A library that breaks the GPU of a process which knows nothing of it. The driver loads what
// CUDA_INJECTION64_PATH names when the process starts it, as it does for profilers, and calls
// InitializeInjection().
//
// From the environment: STILLFRAME_BREAK_FILE, a path. Whoever finds a file there first removes it
// and breaks its first GPU.
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>

#include "base/check.h"
#include "tests/support/break_gpu.h"

namespace {

namespace cuda = stillframe::cuda;

void break_when_told(const std::string& path) {
  while (::unlink(path.c_str()) != 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  auto driver = cuda::Driver::load();
  stillframe::check(driver.has_value(), "the driver that loaded this is there");
  auto context = cuda::Context::retain(*driver, 0);
  stillframe::check(context.has_value(), "the process has a GPU");
  auto stream = cuda::create_stream(*context);
  stillframe::check(stream.has_value(), "the GPU is not broken yet");
  stillframe::testing::break_gpu(*context, stream->get());
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char* const path = std::getenv("STILLFRAME_BREAK_FILE");
  if (path == nullptr) return 0;
  std::thread(break_when_told, std::string(path)).detach();
  return 1;
}
