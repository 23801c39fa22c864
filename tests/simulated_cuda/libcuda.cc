// The entry points of a simulated libcuda.so.1; control.h says what for.
#include <cuda.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tests/simulated_cuda/control.h"
#include "tests/simulated_cuda/kernel_run.h"
#include "tests/simulated_cuda/machine.h"

#if !defined(CUDAAPI)
#define CUDAAPI
#endif
#define ENTRY extern "C" __attribute__((visibility("default"))) CUresult CUDAAPI

namespace sim = stillframe::simulated_cuda;

// What the handles of cuda.h point to.
struct CUctx_st {
  int ordinal = 0;
  std::uint64_t retained = 0;
};
struct CUstream_st {
  CUstream_st(int ordinal, std::uint64_t seed)
      : shared(std::make_shared<sim::Stream>(ordinal, seed)), stream(*shared) {}
  std::shared_ptr<sim::Stream> shared;
  sim::Stream& stream;
};
struct CUevent_st {
  std::shared_ptr<sim::Event> event = std::make_shared<sim::Event>();
};
struct CUfunc_st {
  sim::Kernel kernel;
};
struct CUmod_st {
  CUfunc_st pack = {sim::Kernel::kPack};
  CUfunc_st unpack = {sim::Kernel::kUnpack};
  CUfunc_st copy = {sim::Kernel::kCopy};
};

namespace {

constexpr int kGpusMax = 8;

// Everything there is. Lives until the process ends, for threads may outlive the destructors.
struct Machine {
  sim::Memory memory;
  std::mutex mutex;
  int gpu_count = 2;          // Of this process.
  int copy_ms = 0;            // How long a copy to the host takes at least.
  int places[kGpusMax] = {};  // Which of the machine's each of them is.
  bool is_started = false;
  CUctx_st contexts[kGpusMax];
  std::unique_ptr<CUstream_st> default_streams[kGpusMax];
  std::set<void*> handles;
  std::vector<std::weak_ptr<sim::Stream>> streams;  // Of all GPUs.
  std::atomic<std::uint64_t> seed = 1;
  std::atomic<std::uint64_t> launches = 0;
  // Which call is to fail.
  std::uint64_t calls = 0;
  std::string fail_call;
  std::uint64_t fail_in = 0;  // 0: none.
  int fail_result = 0;
  bool fail_is_sticky = false;
  int broken = 0;  // A sticky error.
};

// As cuDeviceGetUuid() gives it.
std::string uuid_text(int place) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += "5";
    text += std::to_string(place);  // Below kGpusMax.
  }
  return text;
}

// CUDA_VISIBLE_DEVICES: numbers or UUIDs; the first that is neither ends the list.
void see(Machine& all, std::string_view list) {
  int seen = 0;
  while (seen < kGpusMax) {
    const std::string_view word = list.substr(0, list.find(','));
    int place = 0;
    while (place < all.gpu_count && word != uuid_text(place) && word != std::to_string(place)) {
      ++place;
    }
    if (place == all.gpu_count) break;
    all.places[seen++] = place;
    if (word.size() == list.size()) break;
    list.remove_prefix(word.size() + 1);
  }
  all.gpu_count = seen;
}

// What simulated_cuda_fail() is told: "CALL:NTH:RESULT:STICKY".
void plan(Machine& all, const std::string& fault) {
  char call[64] = {};
  unsigned long long nth = 0;
  int result = 0;
  int is_sticky = 0;
  if (std::sscanf(fault.c_str(), "%63[^:]:%llu:%d:%d", call, &nth, &result, &is_sticky) != 4) {
    sim::violate("STILLFRAME_SIMULATED_FAULT=" + fault + ": not CALL:NTH:RESULT:STICKY");
  }
  all.fail_call = std::strcmp(call, "any") == 0 ? "" : call;
  all.fail_in = nth;
  all.fail_result = result;
  all.fail_is_sticky = is_sticky != 0;
}

Machine& machine() {
  static Machine* const made = [] {
    auto* const fresh = new Machine;
    if (const char* const count = std::getenv("STILLFRAME_SIMULATED_GPUS")) {
      fresh->gpu_count = std::min(std::atoi(count), kGpusMax);
    }
    if (const char* const ms = std::getenv("STILLFRAME_SIMULATED_COPY_MS")) {
      fresh->copy_ms = std::atoi(ms);
    }
    for (int i = 0; i < kGpusMax; ++i) fresh->places[i] = i;
    if (const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES")) see(*fresh, visible);
    if (const char* const bytes = std::getenv("STILLFRAME_SIMULATED_BYTES")) {
      fresh->memory.limit(std::strtoull(bytes, nullptr, 10));
    }
    if (const char* const fault = std::getenv("STILLFRAME_SIMULATED_FAULT")) plan(*fresh, fault);
    for (int i = 0; i < kGpusMax; ++i) fresh->contexts[i].ordinal = i;
    return fresh;
  }();
  return *made;
}

// The contexts that a thread has pushed.
thread_local std::vector<CUcontext> pushed;

// What a call gives before it does anything; CUDA_SUCCESS: it may go on.
CUresult enter(const char* call) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  ++all.calls;
  if (all.broken != 0) return static_cast<CUresult>(all.broken);
  if (all.fail_in != 0 && (all.fail_call.empty() || all.fail_call == call) && --all.fail_in == 0) {
    if (all.fail_is_sticky) all.broken = all.fail_result;
    return static_cast<CUresult>(all.fail_result);
  }
  if (!all.is_started && std::strcmp(call, "cuInit") != 0) return CUDA_ERROR_NOT_INITIALIZED;
  return CUDA_SUCCESS;
}

#define ENTER(call)                                                      \
  do {                                                                   \
    if (const CUresult entered = enter(call); entered != CUDA_SUCCESS) { \
      return entered;                                                    \
    }                                                                    \
  } while (false)
#define ENTER_WITH_CONTEXT(call) \
  ENTER(call);                   \
  if (pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT

template <class Handle>
Handle add_handle(Handle handle) {
  const std::lock_guard lock(machine().mutex);
  machine().handles.insert(handle);
  return handle;
}

void check_handle(void* handle, const char* what) {
  const std::lock_guard lock(machine().mutex);
  if (!machine().handles.contains(handle)) {
    sim::violate(std::string("use of ") + what + " that was destroyed or never made");
  }
}

void remove_handle(void* handle, const char* what) {
  const std::lock_guard lock(machine().mutex);
  if (machine().handles.erase(handle) == 0) {
    sim::violate(std::string("end of ") + what + " that was destroyed or never made");
  }
}

CUstream_st& stream_of(CUstream stream) {
  if (stream != nullptr) {
    check_handle(stream, "a stream");
    return *stream;
  }
  const int ordinal = pushed.empty() ? 0 : pushed.back()->ordinal;
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  auto& made = all.default_streams[ordinal];
  if (!made) {
    made = std::make_unique<CUstream_st>(ordinal, all.seed++);
    all.streams.push_back(made->shared);
  }
  return *made;
}

bool is_ordinal(int ordinal) { return ordinal >= 0 && ordinal < machine().gpu_count; }

// Memory of the host for a copy: page-locked or not, but never a GPU's.
void check_host(const void* memory) {
  sim::Allocation found;
  if (machine().memory.look_up(reinterpret_cast<CUdeviceptr>(memory), found)) {
    sim::violate("a GPU's address is given where one of the host belongs");
  }
}

}  // namespace

// --- Control -------------------------------------------------------------------------------------

#define CONTROL extern "C" __attribute__((visibility("default")))

CONTROL void simulated_cuda_fail(const char* call, std::uint64_t nth, int result, bool is_sticky) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  all.fail_call = call;
  all.fail_in = nth;
  all.fail_result = result;
  all.fail_is_sticky = is_sticky;
}

CONTROL void simulated_cuda_heal() {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  all.fail_in = 0;
  all.broken = 0;
}

CONTROL void simulated_cuda_limit(std::uint64_t device_bytes) {
  machine().memory.limit(device_bytes);
}

CONTROL simulated_cuda_counts simulated_cuda_count() {
  Machine& all = machine();
  simulated_cuda_counts counts = {.calls = 0,
                                  .device_bytes = all.memory.device_bytes(),
                                  .host_bytes = all.memory.host_bytes(),
                                  .handles = 0,
                                  .launches = all.launches};
  const std::lock_guard lock(all.mutex);
  counts.calls = all.calls;
  counts.handles = all.handles.size() + all.memory.shared_count();
  return counts;
}

// --- The driver and its GPUs ---------------------------------------------------------------------

ENTRY cuInit(unsigned int) {
  ENTER("cuInit");
  if (machine().gpu_count <= 0) return CUDA_ERROR_NO_DEVICE;
  const std::lock_guard lock(machine().mutex);
  machine().is_started = true;
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

// --- Memory --------------------------------------------------------------------------------------

ENTRY cuMemAlloc(CUdeviceptr* data, std::size_t bytes) {
  ENTER_WITH_CONTEXT("cuMemAlloc");
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *data = machine().memory.allocate(pushed.back()->ordinal, bytes);
  return *data == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

ENTRY cuMemFree(CUdeviceptr data) {
  machine().memory.free(data);
  return enter("cuMemFree");
}

ENTRY cuMemHostAlloc(void** data, std::size_t bytes, unsigned int) {
  ENTER_WITH_CONTEXT("cuMemHostAlloc");
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *data = machine().memory.allocate_host(bytes);
  return CUDA_SUCCESS;
}

ENTRY cuMemFreeHost(void* data) {
  machine().memory.free_host(data);
  return enter("cuMemFreeHost");
}

ENTRY cuMemHostRegister(void* data, std::size_t bytes, unsigned int) {
  ENTER_WITH_CONTEXT("cuMemHostRegister");
  return machine().memory.register_host(data, bytes) ? CUDA_SUCCESS
                                                     : CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
}

ENTRY cuMemHostUnregister(void* data) {
  if (!machine().memory.unregister_host(data)) {
    sim::violate("cuMemHostUnregister of what is not registered");
  }
  return enter("cuMemHostUnregister");
}

ENTRY cuMemHostGetDevicePointer(CUdeviceptr* address, void* host, unsigned int) {
  ENTER_WITH_CONTEXT("cuMemHostGetDevicePointer");
  *address = machine().memory.find_host(host);
  return *address == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

ENTRY cuMemcpyDtoHAsync(void* target, CUdeviceptr source, std::size_t bytes, CUstream stream) {
  ENTER_WITH_CONTEXT("cuMemcpyDtoHAsync");
  check_host(target);
  stream_of(stream).stream.enqueue([=] {
    if (const int ms = machine().copy_ms; ms > 0)
      (void)::usleep(static_cast<useconds_t>(1000 * ms));
    const sim::Allocation from = machine().memory.find(source, bytes, "a copy to the host");
    std::memcpy(target, from.memory + (source - from.begin), bytes);
  });
  return CUDA_SUCCESS;
}

ENTRY cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, std::size_t bytes,
                        CUstream stream) {
  ENTER_WITH_CONTEXT("cuMemcpyHtoDAsync");
  check_host(source);
  stream_of(stream).stream.enqueue([=] {
    const sim::Allocation to = machine().memory.find(target, bytes, "a copy to a GPU");
    std::memcpy(to.memory + (target - to.begin), source, bytes);
  });
  return CUDA_SUCCESS;
}

ENTRY cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, std::size_t bytes,
                        CUstream stream) {
  ENTER_WITH_CONTEXT("cuMemcpyDtoDAsync");
  stream_of(stream).stream.enqueue([=] {
    const sim::Allocation from = machine().memory.find(source, bytes, "a copy on a GPU");
    const sim::Allocation to = machine().memory.find(target, bytes, "a copy on a GPU");
    std::memcpy(to.memory + (target - to.begin), from.memory + (source - from.begin), bytes);
  });
  return CUDA_SUCCESS;
}

ENTRY cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes, void** values,
                             CUdeviceptr address) {
  ENTER("cuPointerGetAttributes");
  sim::Allocation found;
  const bool is_known = machine().memory.look_up(address, found) &&
                        found.kind != sim::Allocation::Kind::kHost &&
                        found.kind != sim::Allocation::Kind::kRegistered;
  // As was seen of a real one: what was reserved together, however it is mapped.
  std::pair<CUdeviceptr, std::size_t> range(found.begin, found.bytes);
  if (found.kind == sim::Allocation::Kind::kShared) range = machine().memory.find_reserved(address);
  for (unsigned int i = 0; i < count; ++i) {
    switch (attributes[i]) {
      case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *static_cast<unsigned int*>(values[i]) = is_known ? CU_MEMORYTYPE_DEVICE : 0;
        break;
      case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<unsigned int*>(values[i]) = 0; break;
      case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *static_cast<int*>(values[i]) = found.ordinal;
        break;
      case CU_POINTER_ATTRIBUTE_BUFFER_ID:
        *static_cast<unsigned long long*>(values[i]) = found.id;
        break;
      case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        *static_cast<CUdeviceptr*>(values[i]) = range.first;
        break;
      case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        *static_cast<std::size_t*>(values[i]) = range.second;
        break;
      case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        *static_cast<unsigned int*>(values[i]) =
            is_known && found.kind == sim::Allocation::Kind::kDevice ? 1 : 0;
        break;
      case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        *static_cast<unsigned long long*>(values[i]) =
            found.shared && found.shared->may_be_shared
                ? static_cast<unsigned long long>(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
                : 0U;
        break;
      default: return CUDA_ERROR_INVALID_VALUE;
    }
  }
  return CUDA_SUCCESS;
}

// --- Memory that crosses processes
// ----------------------------------------------------------------

namespace {
constexpr std::size_t kShareUnit = std::size_t{2} << 20;
}

ENTRY cuMemGetInfo(std::size_t* free_bytes, std::size_t* bytes) {
  ENTER_WITH_CONTEXT("cuMemGetInfo");
  *bytes = machine().memory.limit();
  *free_bytes = *bytes - std::min<std::size_t>(*bytes, machine().memory.device_bytes());
  return CUDA_SUCCESS;
}

ENTRY cuMemGetAllocationGranularity(std::size_t* unit, const CUmemAllocationProp*,
                                    CUmemAllocationGranularity_flags) {
  ENTER("cuMemGetAllocationGranularity");
  *unit = kShareUnit;
  return CUDA_SUCCESS;
}

ENTRY cuMemCreate(CUmemGenericAllocationHandle* memory, std::size_t bytes,
                  const CUmemAllocationProp* wanted, unsigned long long) {
  ENTER("cuMemCreate");
  if (bytes == 0 || bytes % kShareUnit != 0 || !is_ordinal(wanted->location.id)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *memory = machine().memory.make_shared(
      wanted->location.id, bytes,
      (wanted->requestedHandleTypes & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0);
  return *memory == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

ENTRY cuMemRelease(CUmemGenericAllocationHandle memory) {
  if (!machine().memory.release_shared(memory)) {
    sim::violate("cuMemRelease of what was released");
  }
  return enter("cuMemRelease");
}

ENTRY cuMemExportToShareableHandle(void* exported, CUmemGenericAllocationHandle memory,
                                   CUmemAllocationHandleType type, unsigned long long) {
  ENTER("cuMemExportToShareableHandle");
  const auto shared = machine().memory.find_shared(memory);
  if (!shared || !shared->may_be_shared || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int fd = ::dup(shared->fd);
  std::memcpy(exported, &fd, sizeof fd);
  return fd < 0 ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
}

ENTRY cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* memory, void* exported,
                                     CUmemAllocationHandleType) {
  ENTER_WITH_CONTEXT("cuMemImportFromShareableHandle");
  *memory = machine().memory.take_shared(
      static_cast<int>(reinterpret_cast<std::intptr_t>(exported)), pushed.back()->ordinal);
  return *memory == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

ENTRY cuMemGetAddressRange(CUdeviceptr* begin, std::size_t* bytes, CUdeviceptr address) {
  ENTER_WITH_CONTEXT("cuMemGetAddressRange");
  sim::Allocation found;
  if (!machine().memory.look_up(address, found)) return CUDA_ERROR_NOT_FOUND;
  *begin = found.begin;
  *bytes = found.bytes;
  return CUDA_SUCCESS;
}

ENTRY cuMemAddressReserve(CUdeviceptr* address, std::size_t bytes, std::size_t, CUdeviceptr,
                          unsigned long long) {
  ENTER("cuMemAddressReserve");
  if (bytes == 0 || bytes % kShareUnit != 0) return CUDA_ERROR_INVALID_VALUE;
  *address = machine().memory.reserve(bytes);
  return CUDA_SUCCESS;
}

ENTRY cuMemAddressFree(CUdeviceptr address, std::size_t bytes) {
  machine().memory.unreserve(address, bytes);
  return enter("cuMemAddressFree");
}

ENTRY cuMemMap(CUdeviceptr address, std::size_t bytes, std::size_t,
               CUmemGenericAllocationHandle memory, unsigned long long) {
  ENTER("cuMemMap");
  return machine().memory.map_shared(address, bytes, memory) ? CUDA_SUCCESS
                                                             : CUDA_ERROR_INVALID_VALUE;
}

ENTRY cuMemUnmap(CUdeviceptr address, std::size_t bytes) {
  machine().memory.unmap_shared(address, bytes);
  return enter("cuMemUnmap");
}

ENTRY cuMemSetAccess(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc*, std::size_t) {
  ENTER("cuMemSetAccess");
  return machine().memory.allow(address, bytes) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

ENTRY cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* memory, void* address) {
  ENTER("cuMemRetainAllocationHandle");
  *memory = machine().memory.find_shared_at(reinterpret_cast<CUdeviceptr>(address));
  return *memory == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

ENTRY cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr data) {
  ENTER_WITH_CONTEXT("cuIpcGetMemHandle");
  return machine().memory.name(data, *handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

ENTRY cuIpcOpenMemHandle(CUdeviceptr* data, CUipcMemHandle handle, unsigned int) {
  ENTER_WITH_CONTEXT("cuIpcOpenMemHandle");
  *data = machine().memory.open(handle, pushed.back()->ordinal);
  return *data == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

ENTRY cuIpcCloseMemHandle(CUdeviceptr data) {
  machine().memory.close(data);
  return enter("cuIpcCloseMemHandle");
}

ENTRY cuStreamWaitValue32(CUstream stream, CUdeviceptr address, cuuint32_t value,
                          unsigned int flags) {
  ENTER_WITH_CONTEXT("cuStreamWaitValue32");
  if (flags != CU_STREAM_WAIT_VALUE_GEQ) return CUDA_ERROR_NOT_SUPPORTED;
  const sim::Allocation found = machine().memory.find(address, sizeof value, "a stream's wait");
  auto* const word =
      reinterpret_cast<std::atomic<cuuint32_t>*>(found.memory + (address - found.begin));
  stream_of(stream).stream.enqueue([word, value] {
    while (static_cast<std::int32_t>(word->load() - value) < 0) ::usleep(20);
  });
  return CUDA_SUCCESS;
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
  } else {
    return CUDA_ERROR_NOT_FOUND;
  }
  return CUDA_SUCCESS;
}

ENTRY cuLaunchKernel(CUfunction function, unsigned int blocks, unsigned int, unsigned int,
                     unsigned int threads, unsigned int, unsigned int, unsigned int,
                     CUstream stream, void** arguments, void**) {
  ENTER_WITH_CONTEXT("cuLaunchKernel");
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
