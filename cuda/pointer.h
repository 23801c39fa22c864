#pragma once

#include <cstdint>

#include "base/result.h"
#include "cuda/driver.h"

namespace stillframe::cuda {

// What the driver knows of an address.
struct PointerFacts {
  bool is_on_gpu = false;  // False: the host's, page-locked or not, or nobody's.
  bool is_managed = false;
  int ordinal = 0;
  // Names an allocation for good: another one at the same address has another id.
  std::uint64_t buffer_id = 0;
  std::uint64_t range_begin = 0;
  std::uint64_t range_bytes = 0;
  // How another process may map it: neither, where its allocator does not share.
  bool has_legacy_ipc = false;
  bool has_descriptor = false;
};

// Any thread, whatever its current context.
Result<PointerFacts> look_up_pointer(const Driver& driver, const void* address);

}  // namespace stillframe::cuda
