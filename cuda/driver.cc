#include "cuda/driver.h"

#include <dlfcn.h>

#include "base/text.h"

namespace stillframe::cuda {

namespace {

constexpr const char* kLibrary = "libcuda.so.1";

Code code_of(CUresult result) noexcept {
  switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY:
    case CUDA_ERROR_OPERATING_SYSTEM: return Code::kResourceExhausted;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_DEVICE:
    case CUDA_ERROR_INVALID_HANDLE: return Code::kInvalidArgument;
    default: return Code::kUnavailable;  // Some hundred others: the GPU, its driver, its context.
  }
}

}  // namespace

Result<std::shared_ptr<const Driver>> Driver::load() {
  // Global state of the process, as the trainer's own: it is not ours to unload.
  void* const library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) {
    const char* const why = ::dlerror();
    return Error(Code::kUnavailable, concat("no NVIDIA driver: ", why != nullptr ? why : kLibrary));
  }
  auto driver = std::make_shared<Driver>();
  const char* missing = nullptr;
#define STILLFRAME_CUDA_TEXT(name) #name
#define STILLFRAME_CUDA_LOOK_UP(name)                                    \
  driver->calls_.name = reinterpret_cast<decltype(driver->calls_.name)>( \
      ::dlsym(library, STILLFRAME_CUDA_TEXT(name)));                     \
  if (driver->calls_.name == nullptr) missing = STILLFRAME_CUDA_TEXT(name);
  STILLFRAME_CUDA_CALLS(STILLFRAME_CUDA_LOOK_UP)
#undef STILLFRAME_CUDA_LOOK_UP
#undef STILLFRAME_CUDA_TEXT
  if (missing != nullptr) {
    return Error(Code::kUnavailable, concat("the NVIDIA driver is too old: ", kLibrary, " has no ",
                                            missing, "; install driver 525 or newer"));
  }
  const CUresult started = driver->calls_.cuInit(0);
  if (started != CUDA_SUCCESS) return driver->error("start the NVIDIA driver", started);
  const CUresult asked = driver->calls_.cuDriverGetVersion(&driver->version_);
  if (asked != CUDA_SUCCESS) return driver->error("ask for the driver's version", asked);
  return std::shared_ptr<const Driver>(std::move(driver));
}

Error Driver::error(std::string_view doing, CUresult result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  (void)calls_.cuGetErrorName(result, &name);
  (void)calls_.cuGetErrorString(result, &text);
  return Error(
      code_of(result),
      concat(doing, ": ", name != nullptr ? name : "unknown", " (", static_cast<int>(result), ")",
             text != nullptr ? concat(": ", text) : std::string()),
      static_cast<int>(result));
}

Status Driver::check(std::string_view doing, CUresult result) const {
  if (result == CUDA_SUCCESS) return ok();
  return error(doing, result);
}

}  // namespace stillframe::cuda
