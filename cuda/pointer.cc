#include "cuda/pointer.h"

#include <iterator>
#include <utility>

namespace stillframe::cuda {

Result<PointerFacts> look_up_pointer(const Driver& driver, const void* address) {
  unsigned int memory_type = 0;
  unsigned int is_managed = 0;
  int ordinal = 0;
  unsigned long long buffer_id = 0;
  CUdeviceptr range_begin = 0;
  std::size_t range_bytes = 0;
  unsigned int has_legacy_ipc = 0;
  unsigned long long handle_types = 0;
  CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                      CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                      CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                                      CU_POINTER_ATTRIBUTE_BUFFER_ID,
                                      CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                      CU_POINTER_ATTRIBUTE_RANGE_SIZE,
                                      CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
                                      CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES};
  void* values[] = {&memory_type, &is_managed,  &ordinal,        &buffer_id,
                    &range_begin, &range_bytes, &has_legacy_ipc, &handle_types};
  auto asked =
      driver.check("look an address up",
                   driver.calls().cuPointerGetAttributes(
                       std::size(attributes), attributes, values,
                       static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(address))));
  if (!asked) return std::move(asked).error();
  return PointerFacts{
      .is_on_gpu = memory_type == CU_MEMORYTYPE_DEVICE,
      .is_managed = is_managed != 0,
      .ordinal = ordinal,
      .buffer_id = buffer_id,
      .range_begin = range_begin,
      .range_bytes = range_bytes,
      .has_legacy_ipc = has_legacy_ipc != 0,
      .has_descriptor = (handle_types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0};
}

Result<Allocation> find_allocation(const Context& context, std::uint64_t address) {
  const Current current(context);
  CUdeviceptr begin = 0;
  std::size_t bytes = 0;
  auto found = context.driver().check(
      "look an allocation up", context.calls().cuMemGetAddressRange(&begin, &bytes, address));
  if (!found) return std::move(found).error();
  return Allocation{.begin = begin, .bytes = bytes};
}

}  // namespace stillframe::cuda
