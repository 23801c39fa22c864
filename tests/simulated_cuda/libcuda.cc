// Entry points of a simulated libcuda.so.1: GPUs, contexts, streams, events and kernels; control.h
// says what for.
#include <cstring>
#include <random>
#include <utility>

#include "tests/simulated_cuda/entry.h"

namespace sim = stillframe::simulated_cuda;
using sim::add_handle;
using sim::check_handle;
using sim::enter;
using sim::is_ordinal;
using sim::machine;
using sim::pushed;
using sim::remove_handle;
using sim::stream_of;

// --- The driver and its GPUs ---------------------------------------------------------------------

ENTRY cuInit(unsigned int) {
  ENTER("cuInit");
  if (machine().gpu_count <= 0) return CUDA_ERROR_NO_DEVICE;
  {
    const std::lock_guard lock(machine().mutex);
    if (std::exchange(machine().is_started, true)) return CUDA_SUCCESS;
  }
  sim::inject();
  return CUDA_SUCCESS;
}

ENTRY cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

ENTRY cuGetErrorName(CUresult result, const char** name) {
  switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return CUDA_SUCCESS;
    case CUDA_ERROR_NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return CUDA_SUCCESS;
    case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return CUDA_SUCCESS;
    default: *name = "CUDA_ERROR_UNKNOWN"; return CUDA_SUCCESS;
  }
}

ENTRY cuGetErrorString(CUresult, const char** text) {
  *text = "simulated";
  return CUDA_SUCCESS;
}

ENTRY cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount");
  *count = machine().gpu_count;
  return CUDA_SUCCESS;
}

ENTRY cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER("cuDeviceGet");
  if (!is_ordinal(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

ENTRY cuDeviceGetName(char* name, int length, CUdevice) {
  ENTER("cuDeviceGetName");
  std::strncpy(name, "Simulated GPU", static_cast<std::size_t>(length));
  return CUDA_SUCCESS;
}

ENTRY cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  ENTER("cuDeviceGetUuid");
  std::memset(uuid->bytes, 0x50 + machine().places[device], sizeof uuid->bytes);
  return CUDA_SUCCESS;
}

ENTRY cuDeviceTotalMem(std::size_t* bytes, CUdevice) {
  ENTER("cuDeviceTotalMem");
  *bytes = std::size_t{4} << 30;
  return CUDA_SUCCESS;
}

ENTRY cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  ENTER("cuDeviceGetAttribute");
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}

// --- Contexts ------------------------------------------------------------------------------------

ENTRY cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER("cuDevicePrimaryCtxRetain");
  if (!is_ordinal(device)) return CUDA_ERROR_INVALID_DEVICE;
  const std::lock_guard lock(machine().mutex);
  *context = &machine().contexts[device];
  ++(*context)->retained;
  return CUDA_SUCCESS;
}

ENTRY cuDevicePrimaryCtxRelease(CUdevice device) {
  ENTER("cuDevicePrimaryCtxRelease");
  const std::lock_guard lock(machine().mutex);
  if (machine().contexts[device].retained-- == 0) {
    sim::violate("a primary context is released that was not retained");
  }
  return CUDA_SUCCESS;
}

ENTRY cuCtxCreate(CUcontext*, CUctxCreateParams*, unsigned int, CUdevice) {
  sim::violate("a context is made beside the one that frameworks use");
}

ENTRY cuCtxPushCurrent(CUcontext context) {
  ENTER("cuCtxPushCurrent");
  {
    const std::lock_guard lock(machine().mutex);
    if (context->retained == 0) sim::violate("use of a context that was released");
  }
  pushed.push_back(context);
  return CUDA_SUCCESS;
}

ENTRY cuCtxPopCurrent(CUcontext* context) {
  // Not to fail on demand: what was pushed must be popped.
  if (pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = pushed.back();
  pushed.pop_back();
  return CUDA_SUCCESS;
}

ENTRY cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  // Not to fail on demand, as above.
  std::swap(*mode, sim::recording_mode);
  return CUDA_SUCCESS;
}

ENTRY cuCtxSynchronize() {
  ENTER_WITH_CONTEXT("cuCtxSynchronize");
  std::vector<std::weak_ptr<sim::Stream>> streams;
  {
    const std::lock_guard lock(machine().mutex);
    streams = machine().streams;
  }
  for (const auto& known : streams) {
    const std::shared_ptr<sim::Stream> stream = known.lock();
    if (stream && stream->ordinal() == pushed.back()->ordinal) stream->wait_idle();
  }
  return CUDA_SUCCESS;
}

ENTRY cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER_WITH_CONTEXT("cuCtxGetStreamPriorityRange");
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}

// --- Streams and events --------------------------------------------------------------------------

ENTRY cuStreamCreateWithPriority(CUstream* stream, unsigned int, int) {
  ENTER_WITH_CONTEXT("cuStreamCreateWithPriority");
  *stream = add_handle(new CUstream_st(pushed.back()->ordinal, machine().seed++));
  const std::lock_guard lock(machine().mutex);
  std::erase_if(machine().streams, [](const auto& known) { return known.expired(); });
  machine().streams.push_back((*stream)->shared);
  return CUDA_SUCCESS;
}

ENTRY cuStreamDestroy(CUstream stream) {
  // What ends something does so even when the call fails.
  remove_handle(stream, "a stream");
  delete stream;
  return enter("cuStreamDestroy");
}

ENTRY cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
  ENTER("cuStreamWaitEvent");
  check_handle(event, "an event");
  stream_of(stream).stream.enqueue(
      [event = event->event, recorded = event->event->recorded()] { event->wait(recorded); });
  return CUDA_SUCCESS;
}

ENTRY cuEventCreate(CUevent* event, unsigned int) {
  ENTER_WITH_CONTEXT("cuEventCreate");
  *event = add_handle(new CUevent_st);
  return CUDA_SUCCESS;
}

ENTRY cuEventDestroy(CUevent event) {
  remove_handle(event, "an event");
  delete event;
  return enter("cuEventDestroy");
}

ENTRY cuEventRecord(CUevent event, CUstream stream) {
  ENTER("cuEventRecord");
  check_handle(event, "an event");
  stream_of(stream).stream.enqueue(
      [event = event->event, recorded = event->event->record()] { event->reach(recorded); });
  return CUDA_SUCCESS;
}

ENTRY cuEventQuery(CUevent event) {
  ENTER("cuEventQuery");
  check_handle(event, "an event");
  return event->event->is_reached() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

// --- Kernels -------------------------------------------------------------------------------------

ENTRY cuModuleLoadData(CUmodule* module, const void* image) {
  ENTER_WITH_CONTEXT("cuModuleLoadData");
  constexpr std::uint32_t kFatbinMagic = 0xBA55ED50;
  std::uint32_t magic = 0;
  std::memcpy(&magic, image, sizeof magic);
  if (magic != kFatbinMagic) return CUDA_ERROR_INVALID_IMAGE;
  *module = add_handle(new CUmod_st);
  return CUDA_SUCCESS;
}

ENTRY cuModuleUnload(CUmodule module) {
  remove_handle(module, "a module");
  delete module;
  return enter("cuModuleUnload");
}

ENTRY cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  ENTER("cuModuleGetFunction");
  check_handle(module, "a module");
  if (std::strcmp(name, "stillframe_pack") == 0) {
    *function = &module->pack;
  } else if (std::strcmp(name, "stillframe_unpack") == 0) {
    *function = &module->unpack;
  } else if (std::strcmp(name, "raw_copy") == 0) {
    *function = &module->copy;
  } else if (std::strcmp(name, "trap") == 0) {
    *function = &module->trap;
  } else {
    return CUDA_ERROR_NOT_FOUND;
  }
  return CUDA_SUCCESS;
}

ENTRY cuLaunchKernel(CUfunction function, unsigned int blocks, unsigned int, unsigned int,
                     unsigned int threads, unsigned int, unsigned int, unsigned int,
                     CUstream stream, void** arguments, void**) {
  ENTER_WITH_CONTEXT("cuLaunchKernel");
  if (function->kernel == sim::Kernel::kTrap) {
    stream_of(stream).stream.enqueue(sim::break_process);
    return CUDA_SUCCESS;
  }
  const bool copies = function->kernel == sim::Kernel::kCopy;
  // As the kernels' launch bounds have it.
  if (blocks == 0 || threads != (copies ? 256 : stillframe::kernels::kBlockThreads)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  ++machine().launches;
  if (copies) {
    const auto source = *static_cast<const CUdeviceptr*>(arguments[0]);
    const auto target = *static_cast<const CUdeviceptr*>(arguments[1]);
    const auto quads = *static_cast<const unsigned long long*>(arguments[2]);
    return cuMemcpyDtoDAsync(target, source, quads * 16, stream);
  }
  stillframe::kernels::PackJob job;
  std::memcpy(&job, arguments[0], sizeof job);
  CUstream_st& on = stream_of(stream);
  on.stream.enqueue([job, blocks, kernel = function->kernel, ordinal = on.stream.ordinal(),
                     seed = machine().seed++] {
    std::mt19937_64 random(seed);
    sim::run_kernel(machine().memory, ordinal, kernel, job, blocks, random);
  });
  return CUDA_SUCCESS;
}
