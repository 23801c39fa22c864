#pragma once

#include <cstdint>

#include "base/result.h"
#include "cuda/context.h"
#include "cuda/driver.h"

namespace stillframe::cuda {

// What the driver knows of an address.
struct PointerFacts {
  bool is_on_gpu = false;  // False: the host's, page-locked or not, or nobody's.
  bool is_managed = false;
  int ordinal = 0;
  // Names an allocation for good: another one at the same address has another id.
  std::uint64_t buffer_id = 0;
  // The allocation; of memory that is mapped page by page all the addresses that were reserved for
  // it, most of them without memory.
  std::uint64_t range_begin = 0;
  std::uint64_t range_bytes = 0;
  // How another process may map it: neither, where its allocator does not share.
  bool has_legacy_ipc = false;
  bool has_descriptor = false;
};

// Any thread, whatever its current context.
Result<PointerFacts> look_up_pointer(const Driver& driver, const void* address);

// The allocation that holds an address of this context's GPU, or what is mapped there by one
// handle.
struct Allocation {
  std::uint64_t begin = 0;
  std::uint64_t bytes = 0;

  bool operator==(const Allocation&) const = default;
};
Result<Allocation> find_allocation(const Context& context, std::uint64_t address);

}  // namespace stillframe::cuda
