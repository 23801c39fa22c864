#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/gpu_plan.h"
#include "client/layout.h"
#include "cuda/resources.h"
#include "kernels/gpu_launch.h"

namespace stillframe::client {

// One GPU's half of a capture, enqueued on two streams of its own in the trainer's context: one
// packs chunks into the two halves of a window in the GPU's memory, the other copies them from
// there to the slot. Without a window the kernel writes to the slot itself.
//
// Nothing here waits for the GPU. What is enqueued uses this object and the slot until is_idle();
// whoever prepares anew or ends either waits for that. One thread at a time, but that is_done() may
// be asked beside hold().
class GpuDevice {
 public:
  // kUnavailable: no such GPU, or no kernels for it.
  static Result<std::unique_ptr<GpuDevice>> open(const std::shared_ptr<const cuda::Driver>& driver,
                                                 int ordinal);

  struct Setting {
    std::byte* staging = nullptr;  // Page-locked, what GpuPlan calls so; may be none.
    bool has_window = true;        // If the GPU has memory for it.
  };
  // For captures of `share` from now on; it lives as long. Allocates all that they need, so that
  // a capture allocates nothing. kResourceExhausted: the GPU has no memory for the early copies.
  Status prepare(const GpuPlan::Share& share, const Layout& layout, const Setting& setting);
  bool has_window() const noexcept { return static_cast<bool>(window_); }

  // For each capture, first: what follows sees what the trainer's stream has done by now. The early
  // copies are made in that stream, so that later work in it cannot overtake them.
  Status follow(CUstream trainer);
  Status fetch(const GpuPlan::Fetch& fetch, std::byte* staging);
  // Packs a chunk of the share and brings it to the slot. Without a window the slot is page-locked.
  Status enqueue(std::size_t chunk, Bytes slot);
  Result<bool> is_done(std::size_t chunk) const;
  // Of the chunk's extents, once it is done.
  std::span<const std::uint64_t> hashes(std::size_t chunk) const;
  // Makes the trainer's stream wait until every chunk that was enqueued has been packed.
  Status hold(CUstream trainer);

  // Whether all that was enqueued before mark_idle() has ended.
  Status mark_idle();
  Result<bool> is_idle() const;

  const std::shared_ptr<const cuda::Context>& context() const noexcept { return context_; }
  std::string window_reason() const { return window_reason_; }

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
  Status drain(const GpuPlan::Chunk& chunk, std::uint64_t half, Bytes target, CUevent done);
  const cuda::Calls& calls() const noexcept { return context_->calls(); }
  Status check(std::string_view doing, CUresult result) const {
    return context_->driver().check(doing, result);
  }

  std::shared_ptr<const cuda::Context> context_;
  kernels::GpuKernels kernels_;
  const GpuPlan::Share* share_ = nullptr;
  const Layout* layout_ = nullptr;

  Grown tables_;                        // For each part its pieces, then its first_piece.
  std::vector<std::byte> uploaded_;     // The same, read by the copy to there.
  std::vector<kernels::PackJob> jobs_;  // By chunk, but for `image`.
  Grown early_;
  Grown hashes_;
  cuda::HostBuffer host_hashes_;
  std::uint64_t host_hashes_bytes_ = 0;
  cuda::DeviceBuffer window_;
  std::uint64_t half_bytes_ = 0;
  std::string window_reason_;

  // After what they use, so that they end first.
  cuda::Stream pack_stream_;
  cuda::Stream copy_stream_;
  cuda::Event followed_;
  cuda::Event packed_[2];
  cuda::Event held_;
  cuda::Event idle_[2];
  std::vector<cuda::Event> done_;  // By chunk.
};

}  // namespace stillframe::client
