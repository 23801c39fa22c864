#include "daemon/snapshot_stream.h"

#include <utility>

#include "base/text.h"

namespace stillframe::daemon {

SnapshotStream::SnapshotStream(const SnapshotPlan& plan, std::function<void()> wake)
    : plan_(plan), wake_(std::move(wake)) {
  for (const std::uint32_t count : plan.extent_counts) seen_.emplace_back(count, false);
}

Status SnapshotStream::accept(const shm::ExtentRecord& record) {
  if (record.part >= seen_.size() || record.extent >= seen_[record.part].size()) {
    return Error(Code::kInvalidArgument, concat("ring: no part ", record.part, " extent ",
                                                record.extent, " in the layout"));
  }
  if (seen_[record.part][record.extent]) {
    return Error(Code::kInvalidArgument,
                 concat("ring: part ", record.part, " extent ", record.extent, " came twice"));
  }
  seen_[record.part][record.extent] = true;
  ++seen_count_;
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back({.part = record.part, .extent = record.extent, .hash = record.hash});
  }
  wake_();
  return ok();
}

Status SnapshotStream::complete() {
  if (seen_count_ != plan_.extent_count) {
    return Error(Code::kInvalidArgument, concat("capture: only ", seen_count_, " of ",
                                                plan_.extent_count, " extents were published"));
  }
  {
    const std::lock_guard lock(mutex_);
    if (end_ == End::kOpen) end_ = End::kComplete;
  }
  wake_();
  return ok();
}

void SnapshotStream::void_capture(Error reason) {
  {
    const std::lock_guard lock(mutex_);
    if (end_ != End::kOpen) return;
    end_ = End::kVoided;
    reason_ = std::move(reason);
  }
  wake_();
}

SnapshotStream::Taken SnapshotStream::take() {
  const std::lock_guard lock(mutex_);
  return {.extents = std::exchange(waiting_, {}), .end = end_};
}

Error SnapshotStream::void_reason() const {
  const std::lock_guard lock(mutex_);
  return reason_ ? *reason_ : Error(Code::kCancelled, "the capture was not voided");
}

}  // namespace stillframe::daemon
