#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "client/deadline.h"
#include "cuda/shared_buffer.h"
#include "kernels/ring_places.h"
#include "shm/channel.h"

namespace stillframe::client {

// Memory of a GPU that its worker owns and this process maps: chunks are packed into it, and the
// worker copies them to the slot (lane hbm). One thread at a time; nothing waits but open().
//
// Once a call has failed the worker counts as gone, and so does what it had not told as drained.
class GpuRing {
 public:
  // A connection to the worker of a GPU by its UUID.
  using Opener = std::function<Result<shm::Channel>(const std::string& gpu_uuid)>;

  // `bytes` of it, or less, but not less than `bytes_min`. kResourceExhausted: the GPU cannot spare
  // that; kUnavailable: there is no worker.
  static Result<std::unique_ptr<GpuRing>> open(const std::shared_ptr<const cuda::Context>& context,
                                               shm::Channel worker, std::uint64_t bytes,
                                               std::uint64_t bytes_min, Deadline deadline);
  std::uint64_t bytes() const noexcept { return memory_.bytes(); }

  // Places for the chunks of a capture, which follow each other around the ring; each is 16-aligned
  // and no larger than the ring.
  void lay_out(std::span<const std::uint64_t> chunk_bytes);
  // Before each capture. All drains before it have ended, or the ring is gone.
  void begin();
  // Whether the chunk's place is free: what lay there before has been drained.
  bool is_free(std::size_t chunk) const noexcept {
    return drained_count_ >= places_[chunk].waits_for;
  }
  CUdeviceptr address(std::size_t chunk) const noexcept {
    return memory_.get() + places_[chunk].offset;
  }
  // The chunk is packed: has it copied to the arena. In the order of the chunks. False: the worker
  // has enough to read; try again.
  Result<bool> drain(std::size_t chunk, std::uint64_t arena_offset, bool is_hurried);
  // The trainer waits: no pauses for what was asked before.
  Status hurry();
  // Takes in what the worker says.
  Status advance();
  std::size_t asked_count() const noexcept { return asked_count_; }
  std::size_t drained_count() const noexcept { return drained_count_; }
  // Whether the worker is at work with the slot.
  bool is_idle() const noexcept { return is_gone_ || drained_count_ == asked_count_; }
  // Whether the worker has gone, which between captures only this finds out.
  bool is_gone();
  // Counts the worker as gone: it does not go on.
  void give_up() noexcept { is_gone_ = true; }

 private:
  GpuRing(shm::Channel worker, cuda::SharedBuffer memory)
      : worker_(std::move(worker)), memory_(std::move(memory)) {}
  Error gone(const Error& why);

  shm::Channel worker_;
  cuda::SharedBuffer memory_;
  std::vector<std::uint64_t> chunk_bytes_;
  std::vector<kernels::RingPlace> places_;
  std::uint64_t first_request_ = 1;  // Of this capture.
  std::size_t asked_count_ = 0;
  std::size_t drained_count_ = 0;
  bool is_paused_for_ = false;  // By any of the drains.
  bool is_gone_ = false;
};

}  // namespace stillframe::client
