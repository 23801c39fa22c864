#pragma once

#include <cuda.h>

#include <memory>
#include <string>
#include <string_view>

#include "base/result.h"

namespace stillframe::cuda {

// clang-format off
// Every entry point of the driver that we use. cuda.h makes some of these names macros for the
// version of the function that it declares, which is what is looked up.
#define STILLFRAME_CUDA_CALLS(CALL) \
  CALL(cuInit) CALL(cuDriverGetVersion) CALL(cuGetErrorName) CALL(cuGetErrorString) \
  CALL(cuDeviceGetCount) CALL(cuDeviceGet) CALL(cuDeviceGetName) CALL(cuDeviceGetUuid) \
  CALL(cuDeviceGetAttribute) CALL(cuDeviceTotalMem) CALL(cuDevicePrimaryCtxRetain) \
  CALL(cuDevicePrimaryCtxRelease) CALL(cuCtxPushCurrent) CALL(cuCtxPopCurrent) \
  CALL(cuCtxGetStreamPriorityRange) CALL(cuStreamCreateWithPriority) CALL(cuStreamDestroy) \
  CALL(cuStreamWaitEvent) CALL(cuEventCreate) CALL(cuEventDestroy) CALL(cuEventRecord) \
  CALL(cuEventQuery) CALL(cuMemAlloc) CALL(cuMemFree) CALL(cuMemHostAlloc) CALL(cuMemFreeHost) \
  CALL(cuMemHostRegister) CALL(cuMemHostUnregister) CALL(cuMemHostGetDevicePointer) \
  CALL(cuMemcpyDtoHAsync) CALL(cuMemcpyHtoDAsync) CALL(cuMemcpyDtoDAsync) \
  CALL(cuPointerGetAttributes) CALL(cuMemGetAddressRange) CALL(cuCtxSynchronize) \
  CALL(cuModuleLoadData) CALL(cuModuleUnload) CALL(cuModuleGetFunction) CALL(cuLaunchKernel) \
  CALL(cuMemGetInfo) \
  CALL(cuMemGetAllocationGranularity) CALL(cuMemCreate) CALL(cuMemRelease) CALL(cuMemMap) \
  CALL(cuMemUnmap) CALL(cuMemSetAccess) CALL(cuMemAddressReserve) CALL(cuMemAddressFree) \
  CALL(cuMemExportToShareableHandle) CALL(cuMemImportFromShareableHandle) \
  CALL(cuMemRetainAllocationHandle) CALL(cuIpcGetMemHandle) CALL(cuIpcOpenMemHandle) \
  CALL(cuIpcCloseMemHandle) CALL(cuStreamWaitValue32) CALL(cuThreadExchangeStreamCaptureMode)
// clang-format on

struct Calls {
#define STILLFRAME_CUDA_POINTER(name) decltype(&::name) name = nullptr;
  STILLFRAME_CUDA_CALLS(STILLFRAME_CUDA_POINTER)
#undef STILLFRAME_CUDA_POINTER
};

// libcuda.so.1, loaded when it is asked for: the same binary runs where there is none. It is never
// unloaded, for the process may use it itself. Any thread.
class Driver {
 public:
  // kUnavailable: no driver, one that is too old for an entry point, or cuInit() refused; the
  // message says which and what to do. cuInit() is called once for each object.
  static Result<std::shared_ptr<const Driver>> load();

  const Calls& calls() const noexcept { return calls_; }
  int version() const noexcept { return version_; }  // 13000: CUDA 13.0.

  // What `result` of `doing` means; native() is `result`:
  // kResourceExhausted for memory, kInvalidArgument for what the
  // driver calls invalid, else kUnavailable.
  Status check(std::string_view doing, CUresult result) const;
  Error error(std::string_view doing, CUresult result) const;

 private:
  Calls calls_;
  int version_ = 0;
};

}  // namespace stillframe::cuda
