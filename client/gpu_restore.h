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

  std::vector<std::vector<Target>> by_part_;  // Sorted by image_offset.
  std::map<int, Gpu> gpus_;
};

// Fills them, for one thread.
class GpuFiller {
 public:
  // `targets` may be null: then there is nothing to fill, ever.
  static Result<GpuFiller> create(const GpuTargets* targets);
  // Has GPUs copy what targets want of the bytes of a part from `offset` on, whole extents. `bytes`
  // must stay as they are until wait() has returned, also where one of the two failed.
  Status fill(std::size_t part, std::uint64_t offset, ConstBytes bytes);
  // Until all of it has arrived. After an error they may still be read, for as long as the GPU does
  // not answer.
  Status wait();

 private:
  struct Device {
    std::shared_ptr<GpuUnpack> unpack;
    cuda::DeviceBuffer extent;  // Where one arrives that is unpacked.
    GpuQueue queue;             // After what it uses, so that it ends first.
    bool is_used = false;       // Since the last wait().
  };

  Status unpack(std::size_t part, std::uint64_t extent, ConstBytes bytes);
  Status copy(std::size_t part, std::uint64_t offset, ConstBytes bytes);

  const GpuTargets* targets_ = nullptr;
  std::map<int, Device> devices_;
};

}  // namespace stillframe::client
