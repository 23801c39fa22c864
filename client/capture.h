#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/capture_sources.h"
#include "kernels/host_copy.h"
#include "shm/ring.h"

namespace stillframe::client {

// Copies one snapshot at a time into its slot, extent by extent, and publishes each in the ring.
// Copier threads start with the first capture and are joined by the destructor; a thread that waits
// may help. An extent is 1 MiB, some 100 us of copying, so one mutex is all that they share.
class CaptureEngine {
 public:
  explicit CaptureEngine(std::uint32_t copier_count) : copier_count_(copier_count) {}
  ~CaptureEngine();
  CaptureEngine(const CaptureEngine&) = delete;
  CaptureEngine& operator=(const CaptureEngine&) = delete;

  // The ring that belongs to the layout. Session thread, no capture running.
  void set_ring(shm::RingProducer ring);

  // What to copy. The sources, what they point to and the slot stay valid until the capture has
  // ended: wait() said kDone, or stop() returned.
  struct Job {
    const CaptureSources* sources = nullptr;
    Bytes slot;
    kernels::CopyKernel kernel;
    std::uint64_t ticket = 0;         // Ours: what wait() names.
    std::uint64_t daemon_ticket = 0;  // What the ring's records say.
    // By part and extent: those that come by publish() instead. nullptr: none.
    const std::vector<std::vector<bool>>* is_packed = nullptr;
    // The daemon hears of the extents only when all are there. While the trainer waits for the
    // copy, what the daemon does with the first of them takes CPU time from copying the others.
    bool is_told_at_end = false;
  };
  // Session thread, no capture running.
  void begin(const Job& job);
  std::uint32_t copier_count() const noexcept { return copier_count_; }

  enum class Progress : std::uint8_t {
    kDone,   // Every extent is in the slot and published.
    kMoved,  // At least one more than before the call, or than when it began to wait.
    kStuck,  // None until `patience_end`.
    kOther,  // That ticket is not the one that is being captured.
  };
  // Of what step() waits.
  enum class Scope : std::uint8_t {
    kAll,
    kHost,  // Of the extents that are copied here.
  };
  // One step of waiting, by any thread: copies one extent when `helps` and one is left, else waits
  // for others to finish one. The Error: what ended the capture early.
  Result<Progress> step(std::uint64_t ticket, bool helps,
                        std::chrono::steady_clock::time_point patience_end,
                        Scope scope = Scope::kAll);

  // An extent of Job::is_packed is in the slot, with this hash. Any thread. The Error: what ended
  // that capture.
  Status publish(std::uint64_t ticket, std::uint32_t part, std::uint32_t extent,
                 std::uint64_t hash);

  // No further extent of that capture is begun; waiting threads get `reason`. Any thread; does not
  // wait. Without a ticket: of whatever is being captured.
  void abort(std::uint64_t ticket, const Error& reason);
  void abort(const Error& reason);
  // abort(), and waits for the extents in hand: afterwards no thread touches sources or slot.
  void stop(const Error& reason);

 private:
  enum class State : std::uint8_t { kIdle, kRunning };

  void abort_locked(const Error& reason);
  void start_copiers_locked();
  void run_copier();
  bool has_work_locked() const noexcept;
  void skip_packed_locked();
  void copy_one(std::unique_lock<std::mutex>& lock);
  void publish_locked(std::size_t part, std::uint32_t extent, std::uint64_t hash);

  const std::uint32_t copier_count_;
  std::mutex mutex_;
  std::condition_variable work_;  // For copiers: there is work, or the end.
  std::condition_variable
      changed_;  // For waiting threads: an extent is done, or the capture ended.
  std::optional<shm::RingProducer> ring_;
  Job job_;
  State state_ = State::kIdle;
  std::size_t part_count_ = 0;  // Of the job; its sources may be gone once it has ended.
  std::uint64_t extent_count_ = 0;
  std::size_t next_part_ = 0;  // The extent to be taken next; parts follow each other.
  std::uint32_t next_extent_ = 0;
  std::uint64_t done_count_ = 0;
  std::uint64_t packed_count_ = 0;  // Of all extents, those of Job::is_packed; and of those done.
  std::uint64_t packed_done_count_ = 0;
  std::uint64_t in_hand_count_ = 0;
  std::optional<Error> failure_;
  bool is_ending_ = false;
  bool are_copiers_started_ = false;
  std::vector<std::thread> copiers_;
};

// One copier for four CPUs that this process may use, 1 to 4.
std::uint32_t default_copier_count();
// Whether so many copiers and the thread that waits for them leave others less than half of the
// CPUs that this process may use now.
bool are_most_cpus(std::uint32_t copier_count);

}  // namespace stillframe::client
