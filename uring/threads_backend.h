#pragma once

// Files by pread(), pwrite() and fsync() on a few threads: for kernels and containers that refuse
// io_uring (URING-1).

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "uring/completion.h"
#include "uring/posix_files.h"

namespace stillframe::uring {

// The one place below client/ and daemon/ that starts threads: they stand in for the kernel's. They
// make one system call after another, touch nothing but the request they took, and take no signals.
//
// Belongs to the thread that created it, except wake().
class ThreadsBackend final : public PosixFiles {
 public:
  // kResourceExhausted: no more threads here.
  static Result<std::unique_ptr<ThreadsBackend>> create();

  ThreadsBackend(const ThreadsBackend&) = delete;
  ThreadsBackend& operator=(const ThreadsBackend&) = delete;
  // Waits for requests in flight: the threads still write to their memory.
  ~ThreadsBackend() override;

  std::string_view name() const noexcept override { return "threads"; }

  Status submit(IoRequest& request) override;
  std::size_t in_flight() const noexcept override { return in_flight_; }
  std::size_t in_flight_max() const noexcept override { return kInFlightMax; }
  std::span<IoRequest* const> wait(int timeout_ms) override;
  void wake() noexcept override;

  // There is nothing to register with: kUnavailable.
  Status register_memory(Bytes memory) override;
  void unregister_memory(Bytes) noexcept override {}
  std::uint64_t registration_count() const noexcept override { return 0; }

 private:
  static constexpr std::size_t kInFlightMax = 64;
  static constexpr std::size_t kThreadCount = 4;  // The daemon writes at depth 4 (URING-7).

  ThreadsBackend() = default;
  Status start_threads();
  void work();

  std::mutex mutex_;
  std::condition_variable submitted_;
  std::condition_variable ended_;     // A request finished, or wake() came.
  std::deque<Operation> queue_;       // At most kInFlightMax. Under mutex_, as are the next three.
  std::vector<IoRequest*> finished_;  // Not yet handed out.
  bool woken_ = false;
  bool stopping_ = false;

  std::size_t in_flight_ = 0;           // Until wait() has handed them out.
  std::vector<IoRequest*> handed_out_;  // By the last wait().
  std::vector<std::thread> threads_;
};

}  // namespace stillframe::uring
