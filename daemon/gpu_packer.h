#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/mapping.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "cuda/resources.h"
#include "cuda/shared_buffer.h"
#include "daemon/gpu_drain.h"
#include "kernels/gpu_launch.h"
#include "kernels/pack_table.h"
#include "kernels/ring_places.h"
#include "shm/gpu_plan.h"

namespace stillframe::daemon {

// Packs a client's own memory, which it leases for each capture (lane ipc): into memory of this
// process, from where a GpuDrain takes it. One thread; nothing here waits for the GPU.
class GpuPacker {
 public:
  struct Fence {
    Mapping words;
    std::uint32_t word = 0;  // Index; it lies within.
  };
  // `own` is allocation 0, already open; may be empty. At most `ring_bytes_max` of the GPU's memory
  // are taken to pack into; 0: as many as are of use, or half of what is free.
  // kResourceExhausted: there are not enough.
  static Result<std::unique_ptr<GpuPacker>> open(
      const std::shared_ptr<const cuda::Context>& context, shm::GpuPlan plan,
      cuda::SharedBuffer own, Fence fence, std::uint64_t ring_bytes_max);

  // The next allocation. kInvalidArgument: it cannot be opened, or is not what the plan says.
  Status lease(const cuda::IpcHandle& handle);
  Status lease(const UniqueFd& descriptor);
  bool has_all_leases() const noexcept;
  // Closes them. Not while the GPU packs.
  void end_leases() noexcept { leases_.clear(); }

  // With all leases and no capture under way.
  Status begin(std::uint64_t arena_offset, std::uint32_t fence_value);
  // What the client waits for: nothing pauses until then.
  enum class Wait : std::uint8_t { kNothing, kPacking, kAll };
  // Goes on; copies are numbered by their chunk.
  Status advance(GpuDrain& drain, Wait wait);
  // A copy has ended; the hashes of its extents.
  std::span<const std::uint64_t> take(std::uint64_t chunk);
  bool is_capturing() const noexcept { return is_capturing_; }
  // Whether more is to be packed, for which the ring must have room.
  bool has_to_pack() const noexcept { return is_capturing_ && launched_count_ < jobs_.size(); }
  // Whether a kernel may be at work.
  bool is_packing() const noexcept { return packed_count_ < launched_count_; }
  // Nothing more is launched.
  void give_up() noexcept { is_given_up_ = true; }

 private:
  struct Lease {
    cuda::IpcMapping legacy;
    cuda::SharedBuffer shared;
    CUdeviceptr begin = 0;
  };

  GpuPacker(std::shared_ptr<const cuda::Context> context, kernels::GpuKernels kernels,
            shm::GpuPlan plan, cuda::SharedBuffer own, Fence fence);
  Status reserve(std::uint64_t ring_bytes_max);
  std::uint64_t next_allocation_bytes() const;
  Status upload();
  Status launch(std::size_t chunk);
  Status check(std::string_view doing, CUresult result) const {
    return context_->driver().check(doing, result);
  }

  std::shared_ptr<const cuda::Context> context_;
  kernels::GpuKernels kernels_;
  shm::GpuPlan plan_;
  cuda::SharedBuffer own_;
  Fence fence_;
  std::vector<Lease> leases_;  // Of allocations 1 and on.

  std::vector<std::uint64_t> first_hash_;  // By chunk; the last is how many there are.
  std::vector<kernels::RingPlace> places_;
  kernels::PackTables tables_;
  std::vector<kernels::PackJob> jobs_;  // By chunk, but for `image`.
  cuda::DeviceBuffer ring_;
  cuda::DeviceBuffer gpu_tables_;
  cuda::DeviceBuffer hashes_;
  cuda::HostBuffer host_hashes_;

  bool is_capturing_ = false;
  bool is_given_up_ = false;
  std::uint64_t arena_offset_ = 0;
  std::uint32_t fence_value_ = 0;
  std::size_t launched_count_ = 0;
  std::size_t packed_count_ = 0;
  std::size_t drained_count_ = 0;

  // After what they use, so that they end first.
  cuda::Stream stream_;
  std::vector<cuda::Event> packed_;  // By chunk.
};

}  // namespace stillframe::daemon
