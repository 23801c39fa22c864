#include <algorithm>
#include <cstring>

#include "bench/raw/raw.h"

namespace raw {

double copy_seconds(std::byte* target, const std::byte* source, std::size_t bytes,
                    std::size_t thread_count) {
  constexpr std::size_t kPageBytes = 4096;
  const std::size_t share_bytes = (bytes / thread_count + kPageBytes - 1) / kPageBytes * kPageBytes;
  const double start = now_seconds();
  on_threads(thread_count, [&](std::size_t thread) {
    const std::size_t begin = std::min(bytes, thread * share_bytes);
    const std::size_t end =
        thread + 1 == thread_count ? bytes : std::min(bytes, begin + share_bytes);
    std::memcpy(target + begin, source + begin, end - begin);
  });
  return now_seconds() - start;
}

}  // namespace raw
