#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "base/result.h"
#include "uring/io_backend.h"

namespace stillframe::client {

// A thread that owns a backend, so that files stay open between calls that come from any threads.
// One job at a time.
class IoOwner {
 public:
  static Result<std::unique_ptr<IoOwner>> start();
  ~IoOwner();  // Joins.
  IoOwner(const IoOwner&) = delete;
  IoOwner& operator=(const IoOwner&) = delete;

  using Job = std::function<void(uring::IoBackend& io)>;
  // Hands a job over; wait() returns once it has run, or had not the memory to.
  void post(Job job);
  Status wait();
  Status run(Job job) {
    post(std::move(job));
    return wait();
  }

 private:
  IoOwner() = default;
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  Job job_;              // Empty: none.
  Status ended_ = ok();  // How the last one did.
  bool is_ending_ = false;
  bool is_ready_ = false;
  std::optional<Error> start_error_;
  std::thread thread_;
};

}  // namespace stillframe::client
