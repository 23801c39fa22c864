// Entry points of a simulated libcuda.so.1: memory that crosses processes.
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "tests/simulated_cuda/entry.h"

namespace sim = stillframe::simulated_cuda;
using sim::enter;
using sim::is_ordinal;
using sim::machine;
using sim::pushed;
using sim::stream_of;

namespace {
constexpr std::size_t kShareUnit = std::size_t{2} << 20;
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
