#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/gpu_fence.h"
#include "client/gpu_lease.h"
#include "client/gpu_plan.h"
#include "client/gpu_ring.h"
#include "client/gpu_torn_check.h"
#include "client/layout.h"
#include "cuda/resources.h"
#include "kernels/gpu_launch.h"
#include "kernels/pack_table.h"

namespace stillframe::client {

// The way of a GPU's tensors to the slot.
enum class GpuLane : std::uint8_t { kPinned, kHbm, kIpc };

// What the trainer waits for while a capture runs: until then nothing pauses for its sake. At the
// fence that its tensors have been read, else that all has arrived.
enum class GpuWait : std::uint8_t { kNothing, kPacking, kAll };

// One GPU's half of a capture, enqueued on two streams of its own in the trainer's context: one
// packs chunks into the two halves of a window in the GPU's memory, the other copies them from
// there to the slot (lane pinned). With a ring of the GPU's worker they are packed into that, and
// the worker copies them (lane hbm); with a lease the worker packs them as well, and chunks are
// enqueued in name only (lane ipc). With nothing of these the kernel writes to the slot itself.
//
// Nothing here waits for the GPU, but prepare() for a worker. What is enqueued uses this object and
// the slot until is_idle(); whoever prepares anew or ends either waits for that. One thread at a
// time, but that is_done() and watch_hold() may be called beside hold().
class GpuDevice {
 public:
  // kUnavailable: no such GPU, or no kernels for it.
  static Result<std::unique_ptr<GpuDevice>> open(const std::shared_ptr<const cuda::Driver>& driver,
                                                 int ordinal);

  // A slot, and where it lies in the arena.
  struct Slot {
    Bytes bytes;
    std::uint64_t arena_offset = 0;
  };

  struct Setting {
    std::byte* staging = nullptr;  // Page-locked, what GpuPlan calls so; may be none.
    std::uint64_t staging_bytes = 0;
    bool has_window = true;  // If the GPU has memory for it.
    GpuLane lane = GpuLane::kPinned;
    GpuRing::Opener open_worker;   // For the other lanes.
    std::uint64_t ring_bytes = 0;  // At most; 0: as many as a whole capture packs.
  };
  // For captures of `share` from now on; it lives as long. Allocates all that they need, so that
  // a capture allocates nothing. kResourceExhausted: the GPU has no memory for the early copies.
  Status prepare(const GpuPlan::Share& share, const Layout& layout, const Setting& setting);
  // Whether the kernels write to the slot, which is then page-locked.
  bool writes_to_slot() const noexcept { return !window_ && !ring_ && !lease_; }
  GpuLane lane() const noexcept {
    return lease_ ? GpuLane::kIpc : ring_ ? GpuLane::kHbm : GpuLane::kPinned;
  }
  // Whether prepare() anew may bring a worker: it has gone, or there was none and that is a while
  // ago.
  bool wants_worker();
  // It is for an arena that is no more.
  void drop_worker() noexcept {
    ring_.reset();
    lease_.reset();
  }
  // It counts as gone: it does not go on.
  void give_worker_up() noexcept {
    if (ring_) ring_->give_up();
    if (lease_) lease_->give_up();
  }

  // For each capture, first: what follows sees what the trainer's stream has done by now. The early
  // copies are made in that stream, so that later work in it cannot overtake them. `is_lazy`: the
  // trainer goes on before all is captured.
  Status follow(CUstream trainer, bool is_lazy);
  Status fetch(const GpuPlan::Fetch& fetch, std::byte* staging);
  // Then: the staging is filled.
  Status end_bringing();
  // Packs a chunk of the share and brings it to the slot, in the order of the chunks. Without a
  // window the slot is page-locked. Only when can_enqueue().
  Status enqueue(std::size_t chunk, const Slot& slot);
  bool can_enqueue(std::size_t chunk) const noexcept { return !ring_ || ring_->is_free(chunk); }
  bool is_enqueued_at_once() const noexcept { return lease_ != nullptr; }
  // Goes on with what the GPU has packed: is_done() needs it.
  Status advance(const Slot& slot, GpuWait wait);
  Result<bool> is_done(std::size_t chunk) const;
  // Of the chunk's extents, once it is done.
  std::span<const std::uint64_t> hashes(std::size_t chunk) const;
  // Once all chunks are done, of every GPU: whether the slot has what the tensors held, by some
  // blocks of them or, `compares_all`, by all that they hold now. kDataLoss names one that differs.
  Status compare(ConstBytes slot, bool compares_all);
  // Makes the trainer's stream wait until every chunk that was enqueued has been packed. False: the
  // caller waits for is_packed() instead.
  Result<bool> hold(CUstream trainer);
  bool is_packed() const noexcept { return !lease_ || fence_->is_open(); }
  // To be called again and again until all chunks are done: sees when the stream comes to its wait
  // and when that ends.
  Status watch_hold();
  // How long the stream was seen waiting.
  std::chrono::nanoseconds held_for() const noexcept { return held_for_; }
  // The capture is void: nothing waits for its worker any more. Any thread.
  void release() noexcept {
    if (lease_) fence_->release();
  }

  // Whether all that was enqueued before mark_idle() has ended.
  Status mark_idle();
  Result<bool> is_idle();

  const std::shared_ptr<const cuda::Context>& context() const noexcept { return context_; }
  // Why there is no window, or no worker though one was wanted.
  const std::string& window_reason() const noexcept { return window_reason_; }
  const std::string& worker_reason() const noexcept { return worker_reason_; }

 private:
  // A buffer that is kept while it is large enough: to free one waits for all of the GPU's work.
  struct Grown {
    cuda::DeviceBuffer buffer;
    std::uint64_t bytes = 0;
  };

  GpuDevice(std::shared_ptr<const cuda::Context> context, kernels::GpuKernels kernels);
  Status grow(Grown& grown, std::uint64_t bytes);
  Status reserve(const GpuPlan::Share& share);
  Status upload(const Layout& layout, std::byte* staging);
  Status make_window(const Layout& layout);
  void connect(const Layout& layout, const Setting& setting);
  Status make_ring(const Layout& layout, const Setting& setting);
  Status make_lease(const Layout& layout, const Setting& setting);
  Result<shm::Channel> open_worker(const Setting& setting) const;
  Bytes target_of(const GpuPlan::Chunk& chunk, Bytes slot) const;
  Status advance_lease(const Slot& slot, GpuWait wait);
  Status drain(const GpuPlan::Chunk& chunk, std::uint64_t half, Bytes target, CUevent done);
  const cuda::Calls& calls() const noexcept { return context_->calls(); }
  Status check(std::string_view doing, CUresult result) const {
    return context_->driver().check(doing, result);
  }

  std::shared_ptr<const cuda::Context> context_;
  kernels::GpuKernels kernels_;
  const GpuPlan::Share* share_ = nullptr;
  const Layout* layout_ = nullptr;

  kernels::PackTables tables_;  // Read by the copy to the next.
  Grown gpu_tables_;
  std::vector<kernels::PackJob> jobs_;  // By chunk, but for `image`.
  Grown early_;
  Grown hashes_;
  cuda::HostBuffer host_hashes_;
  std::uint64_t host_hashes_bytes_ = 0;
  cuda::DeviceBuffer window_;
  std::uint64_t half_bytes_ = 0;
  std::string window_reason_;
  std::unique_ptr<GpuRing> ring_;
  std::uint64_t ring_wanted_bytes_ = 0;  // What it was opened for; it may be smaller.
  std::unique_ptr<GpuFence> fence_;
  std::unique_ptr<GpuLease> lease_;
  GpuTornCheck torn_check_;
  std::string worker_reason_;
  std::chrono::steady_clock::duration retry_wait_{};  // Longer each time that there is none.
  std::chrono::steady_clock::time_point retry_at_;
  std::byte* staging_ = nullptr;
  std::uint64_t staging_bytes_ = 0;
  std::size_t enqueued_count_ = 0;  // Of this capture.
  // Of its hold: whether there is one, whether its end was seen, and when the stream came to it.
  std::atomic<bool> is_held_ = false;
  bool is_passed_ = false;
  std::optional<std::chrono::steady_clock::time_point> stopped_at_;
  std::chrono::nanoseconds held_for_{};

  // After what they use, so that they end first.
  cuda::Stream pack_stream_;
  cuda::Stream copy_stream_;
  cuda::Event followed_;
  cuda::Event brought_;
  cuda::Event packed_[2];
  cuda::Event stopped_;
  cuda::Event held_;
  cuda::Event idle_[2];
  std::vector<cuda::Event> done_;  // By chunk.
};

}  // namespace stillframe::client
