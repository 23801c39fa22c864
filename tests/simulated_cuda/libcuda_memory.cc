// Entry points of a simulated libcuda.so.1: memory of one process, and copies.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "tests/simulated_cuda/entry.h"

namespace sim = stillframe::simulated_cuda;
using sim::enter;
using sim::machine;
using sim::pushed;
using sim::stream_of;

namespace {

// Memory of the host for a copy: page-locked or not, but never a GPU's.
void check_host(const void* memory) {
  sim::Allocation found;
  if (machine().memory.look_up(reinterpret_cast<CUdeviceptr>(memory), found)) {
    sim::violate("a GPU's address is given where one of the host belongs");
  }
}

}  // namespace

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

ENTRY cuMemGetInfo(std::size_t* free_bytes, std::size_t* bytes) {
  ENTER_WITH_CONTEXT("cuMemGetInfo");
  *bytes = machine().memory.limit();
  *free_bytes = *bytes - std::min<std::size_t>(*bytes, machine().memory.device_bytes());
  return CUDA_SUCCESS;
}

ENTRY cuMemGetAddressRange(CUdeviceptr* begin, std::size_t* bytes, CUdeviceptr address) {
  ENTER_WITH_CONTEXT("cuMemGetAddressRange");
  sim::Allocation found;
  if (!machine().memory.look_up(address, found)) return CUDA_ERROR_NOT_FOUND;
  *begin = found.begin;
  *bytes = found.bytes;
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
