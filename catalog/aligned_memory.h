#pragma once

#include <sys/mman.h>

#include <cerrno>

#include "base/bytes.h"
#include "base/mapping.h"
#include "base/os_error.h"
#include "base/result.h"
#include "base/text.h"

namespace stillframe::catalog {

// Zeroed private memory for O_DIRECT, a whole number of pages.
inline Result<Mapping> allocate_aligned(std::uint64_t bytes) {
  bytes = round_up(bytes, kBlockBytes);
  void* address =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return os_error(concat("allocate ", bytes, " bytes"), errno);
  return Mapping(address, bytes);
}

}  // namespace stillframe::catalog
