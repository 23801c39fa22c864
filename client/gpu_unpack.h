#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/gpu_queue.h"
#include "cuda/resources.h"
#include "kernels/gpu_launch.h"
#include "kernels/pack.h"
#include "kernels/pack_table.h"

namespace stillframe::client {

// An extent with many small tensors comes to a GPU whole, and a kernel brings what it holds to
// their places: a copy and a launch, where each tensor would have been a copy. The kernel hashes
// what has arrived, so damage on the way is seen, too.
class GpuUnpack {
 public:
  // What one part has on this GPU; `pieces` as PackJob has them for unpack().
  struct Part {
    std::vector<kernels::Piece> pieces;
    std::uint64_t image_bytes = 0;
    std::span<const std::uint64_t> extent_hashes;  // Without them it is left alone.
  };
  // nullptr: no extent is worth it. An error, of which nothing is left: the GPU has no memory for
  // it, or this build no kernels.
  static Result<std::shared_ptr<GpuUnpack>> create(
      const std::shared_ptr<const cuda::Context>& context, std::span<const Part> parts);

  // Whether it is for this extent. Any thread.
  bool takes(std::size_t part, std::uint64_t extent) const noexcept;
  // Enqueues such an extent, whose `bytes` were checked. They and `staging`, kExtentBytes of the
  // GPU's memory on a multiple of 16, are in use until the queue is through. Any thread.
  Status enqueue(std::size_t part, std::uint64_t extent, ConstBytes bytes, CUdeviceptr staging,
                 const GpuQueue& queue) const;
  // Once all queues are through, one thread. kDataLoss: an extent has arrived as another one.
  Status check() const;

 private:
  // A part that has such extents.
  struct Image {
    std::vector<bool> is_taken;  // By extent; empty: none.
    std::size_t table = 0;
    std::uint64_t first_hash = 0;  // Of the part's extents among all of them.
  };

  GpuUnpack(kernels::GpuKernels kernels, GpuQueue queue);
  Status upload(std::span<const std::uint64_t> hashes);

  kernels::GpuKernels kernels_;
  std::vector<Image> images_;  // By part.
  kernels::PackTables tables_;
  // The tables, the hashes of all extents, and where the kernel says that one is damaged.
  cuda::DeviceBuffer buffer_;
  std::uint64_t hashes_at_ = 0;
  std::uint64_t damaged_at_ = 0;
  std::uint64_t extent_count_ = 0;
  mutable std::vector<std::byte> host_;  // What a copy of the buffer reads or writes.
  // For what concerns all extents. After what it uses, so that it ends first.
  GpuQueue queue_;
};

}  // namespace stillframe::client
