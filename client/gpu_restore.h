#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/restore_plan.h"
#include "cuda/resources.h"

namespace stillframe::client {

// The tensors of a read that lie on GPUs. Bytes get there only after their extent was checked.
class GpuTargets {
 public:
  // Waits for all that the trainer has enqueued on these GPUs, which may still write to the
  // targets. kUnavailable: no driver; kInvalidArgument: a target is in no GPU's memory.
  static Result<GpuTargets> find(const RestorePlan& plan);

 private:
  friend class GpuFiller;
  struct Target {
    std::uint64_t data = 0;
    std::uint64_t image_offset = 0;
    std::uint64_t bytes = 0;
    int ordinal = 0;
  };

  std::vector<std::vector<Target>> by_part_;  // Sorted by image_offset.
  std::map<int, std::shared_ptr<const cuda::Context>> contexts_;
};

// Fills them, for one thread.
class GpuFiller {
 public:
  // `targets` may be null: then there is nothing to fill, ever.
  static Result<GpuFiller> create(const GpuTargets* targets);
  // Has GPUs copy what targets want of the bytes of a part from `offset` on. `bytes` must stay as
  // they are until wait() has returned, also where one of the two failed.
  Status fill(std::size_t part, std::uint64_t offset, ConstBytes bytes);
  // Until all of it has arrived. After an error they may still be read, for as long as the GPU does
  // not answer.
  Status wait();

 private:
  struct Device {
    std::shared_ptr<const cuda::Context> context;
    cuda::Stream stream;
    cuda::Event event;
    bool is_used = false;  // Since the last wait().
  };

  const GpuTargets* targets_ = nullptr;
  std::map<int, Device> devices_;
};

}  // namespace stillframe::client
