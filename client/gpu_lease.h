#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "client/deadline.h"
#include "client/gpu_fence.h"
#include "client/gpu_plan.h"
#include "client/layout.h"
#include "cuda/shared_buffer.h"
#include "shm/channel.h"
#include "shm/gpu_plan.h"

namespace stillframe::client {

// The trainer's memory of one GPU, lent to the GPU's worker for each capture: that packs it with
// its own kernels and copies it to the slot (lane ipc). What may change too early, and what does
// not lie on that GPU, comes by memory of ours that is shared as well, `own`.
//
// One thread at a time; nothing waits but open() and, where the worker does not read, start(). Once
// a call has failed the worker counts as gone.
class GpuLease {
 public:
  struct Setting {
    const GpuPlan::Share* share = nullptr;
    const Layout* layout = nullptr;
    std::uint64_t staging_bytes = 0;
    std::uint64_t ring_bytes = 0;  // As PlanGpu.
    GpuFence* fence = nullptr;     // Outlives this.
  };
  // Also tries out whether the worker can open all of it. kUnavailable: it cannot, or some memory
  // cannot be shared; the message says which.
  static Result<std::unique_ptr<GpuLease>> open(const std::shared_ptr<const cuda::Context>& context,
                                                shm::Channel worker, const Setting& setting,
                                                Deadline deadline);

  // Where early copies and the staging lie in our shared memory.
  CUdeviceptr early_address() const noexcept { return own_.get(); }
  CUdeviceptr staging_address() const noexcept { return own_.get() + staging_offset_; }

  // Before each capture, when what was lent before is given back or the worker is gone.
  void begin();
  // All that it reads is in place: has the worker begin. The slot's place in the arena.
  Status start(std::uint64_t arena_offset);
  bool is_started() const noexcept { return is_started_; }
  // The trainer waits, until all is packed or, `is_for_all`, in the slot: no pauses until then.
  Status hurry(bool is_for_all);
  // Takes in what the worker says. The Error also when it does not go on.
  Status advance();
  bool is_done(std::size_t chunk) const noexcept { return chunk < done_count_; }
  std::span<const std::uint64_t> hashes(std::size_t chunk) const noexcept { return hashes_[chunk]; }
  // Whether the worker is at work with the slot or with what was lent.
  bool is_idle() const noexcept {
    return is_gone_ || !is_started_ || done_count_ == hashes_.size();
  }
  bool is_gone();
  void give_up() noexcept { is_gone_ = true; }

 private:
  struct Allocation {
    std::uint64_t begin = 0;
    std::uint64_t bytes = 0;
    bool has_descriptor = false;
  };

  GpuLease(std::shared_ptr<const cuda::Context> context, shm::Channel worker)
      : context_(std::move(context)), worker_(std::move(worker)) {}
  Result<UniqueFd> make_own(const Setting& setting);
  Result<shm::GpuPlan> make_plan(const Setting& setting);
  Status add_piece(shm::GpuPlan& plan, const GpuPlan::Piece& piece);
  Result<std::uint32_t> find_allocation(std::uint64_t address);
  Status send_plan(const Setting& setting, const shm::GpuPlan& plan, int own_fd, Deadline deadline);
  Status lend_all();
  Status ask(shm::wire::MessageT message, std::span<const int> fds, Deadline deadline);
  Status send(const shm::wire::MessageT& message, std::span<const int> fds = {});
  Error gone(const Error& why);

  std::shared_ptr<const cuda::Context> context_;
  shm::Channel worker_;
  cuda::SharedBuffer own_;
  std::uint64_t staging_offset_ = 0;
  std::vector<Allocation> allocations_;  // 1 and on, in the order of the plan.
  GpuFence* fence_ = nullptr;
  std::uint32_t fence_value_ = 0;
  std::uint64_t request_ = 0;
  bool is_started_ = false;
  bool is_hurried_ = false;
  bool is_hurried_for_all_ = false;
  bool is_gone_ = false;
  std::size_t done_count_ = 0;
  std::vector<std::vector<std::uint64_t>> hashes_;  // By chunk.
  std::vector<std::uint32_t> extent_counts_;        // By chunk.
  std::chrono::steady_clock::time_point moved_;     // When the worker last said something.
  std::chrono::seconds patience_{0};
  std::set<std::uint64_t> used_slots_;
};

}  // namespace stillframe::client
