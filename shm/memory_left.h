#pragma once

#include <cstdint>
#include <string>

namespace stillframe::shm {

// Where the kernel tells how much memory there is; a test gives other folders.
struct MemoryFiles {
  std::string proc = "/proc";
  std::string cgroup = "/sys/fs/cgroup";
};

// What this process may still take, in bytes: MemAvailable, or less where its cgroup (v2, v1 or
// both) or one above it has a lower limit. A group's page cache counts as free: the kernel drops it
// before it kills. Unlimited (2^64 - 1) where nothing can be read.
std::uint64_t memory_left(const MemoryFiles& files = {});

// Pages of 2 MiB that the hugetlb pool has free and not promised to anybody.
std::uint64_t hugetlb_pages_free(const MemoryFiles& files = {});

}  // namespace stillframe::shm
