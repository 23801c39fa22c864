#include "daemon/gpu_drain.h"

#include <algorithm>
#include <utility>

namespace stillframe::daemon {

namespace {

// A copy engine takes what it is given one after the other, whosesoever it is: what the training
// copies waits for at most two of these, about 1 ms each (GPU-19).
constexpr std::uint64_t kPieceBytes = std::uint64_t{16} << 20;

}  // namespace

GpuDrain::GpuDrain(std::shared_ptr<const cuda::Context> context, shm::Arena arena,
                   std::uint64_t slot_bytes, double share)
    : context_(std::move(context)),
      arena_(std::move(arena)),
      slot_bytes_(slot_bytes),
      share_(share),
      slots_(arena_.bytes().size() / slot_bytes) {}

Result<std::unique_ptr<GpuDrain>> GpuDrain::open(
    const std::shared_ptr<const cuda::Context>& context, shm::Arena arena, std::uint64_t slot_bytes,
    double share) {
  std::unique_ptr<GpuDrain> drain(new GpuDrain(context, std::move(arena), slot_bytes, share));
  auto stream = cuda::create_stream(context);
  if (!stream) return std::move(stream).error();
  drain->stream_ = *std::move(stream);
  for (cuda::Event& event : drain->events_) {
    auto created = cuda::create_event(context);
    if (!created) return std::move(created).error();
    event = *std::move(created);
  }
  return drain;
}

bool GpuDrain::is_within_slot(std::uint64_t arena_offset, std::uint64_t bytes) const noexcept {
  const std::uint64_t all = arena_.bytes().size();
  return arena_offset < all && bytes <= slot_bytes_ - arena_offset % slot_bytes_;
}

void GpuDrain::add(const Copy& copy) {
  // Who waits for this one waits for those before it.
  if (copy.is_hurried) hurry();
  copies_.push_back(copy);
}

void GpuDrain::hurry() noexcept {
  for (Copy& copy : copies_) copy.is_hurried = true;
}

void GpuDrain::give_up() noexcept {
  copies_.clear();
  begun_count_ = 0;
  begun_bytes_ = 0;
  for (Piece& piece : pieces_) piece.is_last = false;
}

Result<std::vector<std::uint64_t>> GpuDrain::advance() {
  std::vector<std::uint64_t> ended;
  while (in_flight_count_ > 0) {
    const std::size_t oldest = (next_event_ + kInFlightMax - in_flight_count_) % kInFlightMax;
    auto happened = cuda::has_happened(*context_, events_[oldest]);
    if (!happened) return std::move(happened).error();
    if (!*happened) break;
    const Piece piece = pieces_.front();
    pieces_.pop_front();
    --in_flight_count_;
    const Clock::time_point now = Clock::now();
    const auto pause = (now - piece.begun) * (1 / share_ - 1);
    pause_ends_ = now + std::chrono::duration_cast<Clock::duration>(pause);
    if (!piece.is_last) continue;
    ended.push_back(copies_.front().id);
    copies_.pop_front();
    --begun_count_;
  }
  while (begun_count_ < copies_.size() && in_flight_count_ < kInFlightMax) {
    if (!copies_[begun_count_].is_hurried && Clock::now() < pause_ends_) break;
    auto begun = begin_piece();
    if (!begun) return std::move(begun).error();
  }
  return ended;
}

Status GpuDrain::begin_piece() {
  const Copy& copy = copies_[begun_count_];
  const std::uint64_t slot_offset = copy.arena_offset / slot_bytes_ * slot_bytes_;
  Slot& slot = slots_[copy.arena_offset / slot_bytes_];
  if (!std::exchange(slot.is_registration_tried, true)) {
    // At the first copy, when its pages are in place. Without it copies are only slower.
    auto registered =
        cuda::register_host(context_, arena_.bytes().subspan(slot_offset, slot_bytes_));
    if (registered) slot.registration = *std::move(registered);
  }
  const std::uint64_t bytes = std::min(kPieceBytes, copy.bytes - begun_bytes_);
  const cuda::Current current(*context_);
  auto copied = context_->driver().check(
      "copy from a GPU", context_->calls().cuMemcpyDtoHAsync(
                             arena_.bytes().subspan(copy.arena_offset + begun_bytes_, bytes).data(),
                             copy.source + begun_bytes_, bytes, stream_.get()));
  if (!copied) return copied;
  auto recorded = context_->driver().check(
      "mark a copy", context_->calls().cuEventRecord(events_[next_event_].get(), stream_.get()));
  if (!recorded) return recorded;
  next_event_ = (next_event_ + 1) % kInFlightMax;
  ++in_flight_count_;
  begun_bytes_ += bytes;
  pieces_.push_back({.begun = Clock::now(), .is_last = begun_bytes_ == copy.bytes});
  if (pieces_.back().is_last) {
    ++begun_count_;
    begun_bytes_ = 0;
  }
  return ok();
}

}  // namespace stillframe::daemon
