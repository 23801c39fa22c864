#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/mapping.h"
#include "base/result.h"
#include "client/layout.h"
#include "kernels/host_copy.h"
#include "uring/io_backend.h"

namespace stillframe::client {

// Writes one part from the tensors' memory to a file that has its whole length already: each block
// is copied and hashed in one visit, written by O_DIRECT while the next ones are copied, and hashed
// again once it is on the drive, so that memory which changed meanwhile is found.
//
// Belongs to the thread of `io`, which has no other request in flight. `part` and `sources` outlive
// it; `staging` has kStagingBytes, on a block's boundary.
class PartWriter {
 public:
  // 4 MiB x 4 in flight, as the daemon's writer (URING-7).
  static constexpr std::size_t kBlockExtents = 4;
  static constexpr std::size_t kDepth = 4;
  static constexpr std::size_t kStagingBytes = kDepth * kBlockExtents * kExtentBytes;

  PartWriter(uring::IoBackend& io, uring::FileId file, const LayoutPart& part,
             std::span<const kernels::Source> sources, Bytes staging);

  // Writes the extents [first, end) and waits for them. kDataLoss: a tensor changed under the hand.
  Status write(std::uint32_t first, std::uint32_t end);
  // Hashes the extents [first, end) without writing them.
  void hash(std::uint32_t first, std::uint32_t end);

  // By extent; 0 for those that were neither written nor hashed.
  std::vector<std::uint64_t>& hashes() noexcept { return hashes_; }

 private:
  struct Flight {
    uring::IoRequest request;
    std::uint32_t first_extent = 0;
    std::uint32_t extent_count = 0;
    bool is_busy = false;
  };

  Bytes block_of(const Flight& flight) const;
  std::uint64_t extent_bytes(std::uint32_t extent) const;
  void capture(std::uint32_t extent, Bytes target);
  void start(Flight& flight, std::uint32_t first, std::uint32_t count);
  void finish_some();
  Status check_block(const Flight& flight) const;

  uring::IoBackend& io_;
  const uring::FileId file_;
  const LayoutPart& part_;
  const std::span<const kernels::Source> sources_;
  const Bytes staging_;
  const kernels::CopyKernel kernel_;
  std::vector<std::uint64_t> hashes_;
  std::array<Flight, kDepth> flights_;
  std::optional<Error> error_;  // The first one; final.
};

}  // namespace stillframe::client
