#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace stillframe::kernels {

// Where chunks that are packed and taken away in turn lie in a ring of memory.
struct RingPlace {
  std::uint64_t offset = 0;   // A multiple of 256.
  std::size_t waits_for = 0;  // So many chunks, from the first on, must have been taken away.
};

// Each of `chunk_bytes` is at most `ring_bytes`.
std::vector<RingPlace> ring_places(std::span<const std::uint64_t> chunk_bytes,
                                   std::uint64_t ring_bytes);

// The smallest ring in which one chunk can be packed while another is taken away, or all of them
// fit; and the smallest that never makes a chunk wait.
struct RingBytes {
  std::uint64_t min = 0;
  std::uint64_t max = 0;
};
RingBytes ring_bytes_for(std::span<const std::uint64_t> chunk_bytes);

}  // namespace stillframe::kernels
