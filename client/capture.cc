#include "client/capture.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/out_of_memory.h"
#include "base/step.h"
#include "base/text.h"
#include "client/quiet_thread.h"
#include "client/session_errors.h"

namespace stillframe::client {

std::uint32_t default_copier_count() {
  return std::clamp<std::uint32_t>(usable_cpu_count() / 4, 1, 4);
}

bool are_most_cpus(std::uint32_t copier_count) {
  return 2 * (copier_count + 1) > usable_cpu_count();
}

CaptureEngine::~CaptureEngine() {
  stop(closed_error());
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  work_.notify_all();
  for (std::thread& copier : copiers_) copier.join();
}

void CaptureEngine::set_ring(shm::RingProducer ring) {
  const std::lock_guard lock(mutex_);
  ring_.emplace(std::move(ring));
}

void CaptureEngine::begin(const Job& job) {
  {
    const std::lock_guard lock(mutex_);
    job_ = job;
    state_ = State::kRunning;
    part_count_ = job.sources->layout().parts.size();
    extent_count_ = job.sources->layout().extent_count;
    next_part_ = 0;
    next_extent_ = 0;
    done_count_ = 0;
    packed_count_ = 0;
    packed_done_count_ = 0;
    if (job.is_packed != nullptr) {
      for (const std::vector<bool>& part : *job.is_packed) {
        packed_count_ += static_cast<std::uint64_t>(std::ranges::count(part, true));
      }
    }
    skip_packed_locked();
    failure_.reset();
    start_copiers_locked();
  }
  work_.notify_all();
}

void CaptureEngine::start_copiers_locked() {
  if (are_copiers_started_) return;
  are_copiers_started_ = true;
  for (std::uint32_t i = 0; i < copier_count_; ++i) {
    auto copier = start_quiet_thread(concat("sf-copy-", i).c_str(), [this] { run_copier(); });
    // No more threads here: the waiting threads copy.
    if (!copier) return;
    copiers_.push_back(*std::move(copier));
  }
}

bool CaptureEngine::has_work_locked() const noexcept {
  return state_ == State::kRunning && !failure_ && next_part_ < part_count_;
}

void CaptureEngine::run_copier() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return is_ending_ || has_work_locked(); });
    if (is_ending_) return;
    copy_one(lock);
  }
}

// To the next extent that is copied here.
void CaptureEngine::skip_packed_locked() {
  const std::vector<LayoutPart>& parts = job_.sources->layout().parts;
  while (next_part_ < part_count_) {
    if (next_extent_ == parts[next_part_].extent_count) {
      ++next_part_;
      next_extent_ = 0;
    } else if (job_.is_packed != nullptr && (*job_.is_packed)[next_part_][next_extent_]) {
      ++next_extent_;
    } else {
      return;
    }
  }
}

// There is work. Unlocks while it copies.
void CaptureEngine::copy_one(std::unique_lock<std::mutex>& lock) {
  const std::size_t part_index = next_part_;
  const std::uint32_t extent = next_extent_;
  const LayoutPart& part = job_.sources->layout().parts[part_index];
  ++next_extent_;
  skip_packed_locked();
  ++in_hand_count_;
  const Job job = job_;
  lock.unlock();

  const std::uint64_t begin = std::uint64_t{extent} * kExtentBytes;
  const std::uint64_t extent_bytes =
      std::min<std::uint64_t>(kExtentBytes, round_up(part.image.bytes - begin, kBlockBytes));
  const std::uint64_t hash = kernels::capture_extent(
      job.kernel, job.sources->of_part(part_index), part.first_source[extent], begin,
      part.image.bytes, job.slot.subspan(part.slot_offset + begin, extent_bytes));

  lock.lock();
  --in_hand_count_;
  // What was aborted meanwhile is not published; the daemon would drop it.
  if (!failure_) publish_locked(part_index, extent, hash);
  changed_.notify_all();
}

void CaptureEngine::publish_locked(std::size_t part, std::uint32_t extent, std::uint64_t hash) {
  STEP("client publish extent");
  const shm::ExtentRecord record{.ticket = job_.daemon_ticket,
                                 .part = static_cast<std::uint32_t>(part),
                                 .extent = extent,
                                 .hash = hash,
                                 .reserved = 0};
  const bool is_told = !job_.is_told_at_end || done_count_ + 1 == extent_count_;
  auto published =
      or_out_of_memory([&] { return is_told ? ring_->publish(record) : ring_->put(record); });
  if (!published) {
    failure_ = std::move(published).error();
    return;
  }
  ++done_count_;
}

Status CaptureEngine::publish(std::uint64_t ticket, std::uint32_t part, std::uint32_t extent,
                              std::uint64_t hash) {
  const std::lock_guard lock(mutex_);
  if (job_.ticket != ticket || state_ != State::kRunning) {
    return Error(Code::kCancelled, "the capture has ended");
  }
  if (!failure_) publish_locked(part, extent, hash);
  if (failure_) return *failure_;
  ++packed_done_count_;
  changed_.notify_all();
  return ok();
}

Result<CaptureEngine::Progress> CaptureEngine::step(
    std::uint64_t ticket, bool helps, std::chrono::steady_clock::time_point patience_end,
    Scope scope) {
  std::unique_lock lock(mutex_);
  const std::uint64_t done_before = done_count_;
  for (;;) {
    if (job_.ticket != ticket) return Progress::kOther;
    if (failure_) return *failure_;
    const std::uint64_t host_done_count = done_count_ - packed_done_count_;
    if (scope == Scope::kAll ? done_count_ == extent_count_
                             : host_done_count == extent_count_ - packed_count_) {
      return Progress::kDone;
    }
    if (done_count_ != done_before) return Progress::kMoved;
    if (helps && has_work_locked()) {
      copy_one(lock);
      continue;
    }
    if (changed_.wait_until(lock, patience_end) == std::cv_status::timeout &&
        done_count_ == done_before && !failure_) {
      return Progress::kStuck;
    }
  }
}

void CaptureEngine::abort(std::uint64_t ticket, const Error& reason) {
  const std::lock_guard lock(mutex_);
  if (job_.ticket == ticket) abort_locked(reason);
}

void CaptureEngine::abort(const Error& reason) {
  const std::lock_guard lock(mutex_);
  abort_locked(reason);
}

void CaptureEngine::abort_locked(const Error& reason) {
  if (state_ != State::kRunning || failure_) return;
  failure_ = reason;
  changed_.notify_all();
}

void CaptureEngine::stop(const Error& reason) {
  std::unique_lock lock(mutex_);
  if (state_ != State::kRunning) return;
  if (!failure_) failure_ = reason;
  changed_.notify_all();
  changed_.wait(lock, [this] { return in_hand_count_ == 0; });
  state_ = State::kIdle;
}

}  // namespace stillframe::client
