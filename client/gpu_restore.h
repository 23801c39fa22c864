#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "catalog/block_reader.h"
#include "client/gpu_queue.h"
#include "client/gpu_unpack.h"
#include "client/restore_plan.h"
#include "cuda/resources.h"

namespace stillframe::client {

// The tensors of a read that lie on GPUs. Bytes get there only after their extent was checked.
class GpuTargets {
 public:
  // Waits for all that the trainer has enqueued on these GPUs, which may still write to the
  // targets. kUnavailable: no driver; kInvalidArgument: a target is in no GPU's memory.
  static Result<GpuTargets> find(const RestorePlan& plan,
                                 const std::vector<catalog::OpenPart>& parts);

  // Once all fillers have waited, one thread. kDataLoss: something was damaged on its way.
  Status check() const;

 private:
  friend class GpuFiller;
  struct Target {
    std::uint64_t data = 0;
    std::uint64_t image_offset = 0;
    std::uint64_t bytes = 0;
    int ordinal = 0;
  };

  struct Gpu {
    std::shared_ptr<const cuda::Context> context;
    std::shared_ptr<GpuUnpack> unpack;  // nullptr: each target is copied on its own.
  };

  void prepare_unpacking(const std::vector<catalog::OpenPart>& parts);
  // The first target of a part that ends behind `offset`; they do not overlap.
  std::vector<Target>::const_iterator first_behind(std::size_t part, std::uint64_t offset) const;

  std::vector<std::vector<Target>> by_part_;  // Sorted by image_offset.
  std::map<int, Gpu> gpus_;
};

// Fills them, for one thread. Bytes go through page-locked memory of its own, one extent while the
// extent before is on its way: a driver copies other memory at a fraction of the bus's rate.
class GpuFiller {
 public:
  // `targets` may be null: then there is nothing to fill, ever.
  static Result<GpuFiller> create(const GpuTargets* targets);
  // Has GPUs copy what targets want of the bytes of a part from `offset` on, whole extents. `bytes`
  // are not needed any more when it has returned, unless the GPU does not answer.
  Status fill(std::size_t part, std::uint64_t offset, ConstBytes bytes);
  // Until all of it has arrived; also after an error, for what was begun before.
  Status wait();

 private:
  static constexpr std::size_t kHalfCount = 2;
  struct Device {
    std::shared_ptr<GpuUnpack> unpack;
    cuda::DeviceBuffer extent;  // Where one arrives that is unpacked.
    cuda::Event copied[kHalfCount];
    GpuQueue queue;         // After what it uses, so that it ends first.
    bool is_used = false;   // Since the last wait().
    bool is_given = false;  // Something of the extent that is being given out.
    bool is_copying[kHalfCount] = {};
  };

  bool is_wanted(std::size_t part, std::uint64_t offset, std::uint64_t bytes) const;
  Result<ConstBytes> stage(ConstBytes extent);
  Status give_out(std::size_t part, std::uint64_t offset, ConstBytes extent);
  Status release();
  Status unpack(std::size_t part, std::uint64_t extent, ConstBytes bytes);
  Status copy(std::size_t part, std::uint64_t offset, ConstBytes bytes);

  const GpuTargets* targets_ = nullptr;
  cuda::HostBuffer staging_;  // Where it cannot be had, an extent is waited for before the next.
  std::size_t half_ = 0;      // In use now.
  std::map<int, Device> devices_;  // After what they use.
};

}  // namespace stillframe::client
