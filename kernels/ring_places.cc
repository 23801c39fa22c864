#include "kernels/ring_places.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/check.h"

namespace stillframe::kernels {

namespace {
constexpr std::uint64_t kAlignment = 256;
}

std::vector<RingPlace> ring_places(std::span<const std::uint64_t> chunk_bytes,
                                   std::uint64_t ring_bytes) {
  std::vector<RingPlace> places;
  std::size_t waits_for = 0;
  std::uint64_t next = 0;
  for (const std::uint64_t bytes : chunk_bytes) {
    check(bytes <= ring_bytes, "a chunk is larger than the ring");
    if (next > ring_bytes || bytes > ring_bytes - next) next = 0;
    // They are taken away in order, so that what may be overwritten only grows.
    for (std::size_t i = waits_for; i < places.size(); ++i) {
      const bool overlaps =
          places[i].offset < next + bytes && next < places[i].offset + chunk_bytes[i];
      if (overlaps) waits_for = i + 1;
    }
    places.push_back({.offset = next, .waits_for = waits_for});
    next = round_up(next + bytes, kAlignment);
  }
  return places;
}

RingBytes ring_bytes_for(std::span<const std::uint64_t> chunk_bytes) {
  std::uint64_t all = 0;
  std::uint64_t largest = 0;
  for (const std::uint64_t bytes : chunk_bytes) {
    all += round_up(bytes, kAlignment);
    largest = std::max(largest, round_up(bytes, kAlignment));
  }
  return {.min = std::min(all, 2 * largest), .max = all};
}

}  // namespace stillframe::kernels
