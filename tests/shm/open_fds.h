#pragma once

#include <cstddef>
#include <filesystem>
#include <iterator>

namespace stillframe::shm {

// How many descriptors this process has open; the one that this itself needs counts each time
// alike.
inline std::size_t open_fd_count() {
  return static_cast<std::size_t>(std::distance(
      std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator()));
}

}  // namespace stillframe::shm
