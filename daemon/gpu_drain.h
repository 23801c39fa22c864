#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "base/result.h"
#include "cuda/resources.h"
#include "shm/arena.h"

namespace stillframe::daemon {

// Copies from a GPU's memory to the slots of one arena, by the copy engine, in order and a few MiB
// at a time, with pauses so that what the training copies finds its turn. One thread; nothing here
// waits.
class GpuDrain {
 public:
  // `share` of the time is spent with copying, 0 < share <= 1, where nobody is in a hurry.
  static Result<std::unique_ptr<GpuDrain>> open(const std::shared_ptr<const cuda::Context>& context,
                                                shm::Arena arena, std::uint64_t slot_bytes,
                                                double share);

  struct Copy {
    std::uint64_t id = 0;
    CUdeviceptr source = 0;
    std::uint64_t arena_offset = 0;
    std::uint64_t bytes = 0;  // Not 0.
    bool is_hurried = false;  // No pauses.
  };
  // Whether these bytes lie within one slot.
  bool is_within_slot(std::uint64_t arena_offset, std::uint64_t bytes) const noexcept;
  std::uint64_t slot_bytes() const noexcept { return slot_bytes_; }
  void add(const Copy& copy);
  // Goes on; the ids of copies that have ended. The Error: the GPU's, with which no more can be
  // done.
  Result<std::vector<std::uint64_t>> advance();
  // No pauses for what was added so far.
  void hurry() noexcept;
  // Nothing more is begun.
  void give_up() noexcept;
  std::size_t waiting_count() const noexcept { return copies_.size(); }
  // Whether a copy is under way: then this object, its arena and the source must stay.
  bool is_copying() const noexcept { return in_flight_count_ > 0; }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kInFlightMax = 2;

  struct Slot {
    bool is_registration_tried = false;
    cuda::HostRegistration registration;
  };
  struct Piece {
    Clock::time_point begun;
    bool is_last = false;  // Of its copy.
  };

  GpuDrain(std::shared_ptr<const cuda::Context> context, shm::Arena arena, std::uint64_t slot_bytes,
           double share);
  Status begin_piece();

  std::shared_ptr<const cuda::Context> context_;
  shm::Arena arena_;
  std::uint64_t slot_bytes_;
  double share_;
  std::vector<Slot> slots_;
  std::deque<Copy> copies_;
  // Of the copies, where the next piece begins.
  std::size_t begun_count_ = 0;
  std::uint64_t begun_bytes_ = 0;
  // Pieces under way, the oldest first; their events are used in turn.
  std::deque<Piece> pieces_;
  std::size_t next_event_ = 0;
  std::size_t in_flight_count_ = 0;
  Clock::time_point pause_ends_;

  // After what they use, so that they end first.
  cuda::Stream stream_;
  cuda::Event events_[kInFlightMax];
};

}  // namespace stillframe::daemon
