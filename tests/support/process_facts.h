#pragma once

// What /proc tells of another process. 0 where it is gone.

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace stillframe::testing {

std::size_t descriptor_count(pid_t pid);
// Memory that no other process shares: without the arenas.
std::int64_t own_memory_kib(pid_t pid);

}  // namespace stillframe::testing
