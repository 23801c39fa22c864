#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "base/result.h"
#include "daemon/task.h"
#include "uring/io_backend.h"

namespace stillframe::daemon {

// Makes the backend, on the thread that will use it.
using BackendFactory = std::function<Result<uring::CreatedBackend>()>;

// The thread of one run's files: everything that touches the run directory is a job here, in the
// order in which it was posted. A hung drive hangs this thread and never the control plane
// (URING-14).
class IoThread {
 public:
  using Job = std::function<void(uring::IoBackend&)>;

  // `context` outlives it. Waits for the backend; kUnavailable when it could not be made.
  static Result<std::unique_ptr<IoThread>> start(asio::io_context& context,
                                                 const BackendFactory& factory);
  // Finishes the queued jobs, then joins. Call where no coroutine waits for run().
  ~IoThread();
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  // Asio thread: runs `job` there and resumes here with its result. The job owns what it needs.
  template <class T>
  Task<T> run(std::function<Result<T>(uring::IoBackend&)> job);

  // Ends an IoBackend::wait() that a job sits in. Any thread.
  void wake() noexcept { backend_->wake(); }

  std::string_view backend_name() const noexcept { return backend_->name(); }
  const std::string& fallback_reason() const noexcept { return fallback_reason_; }

 private:
  // Jobs of one run: its saves (at most one a slot), registrations, retention and requests of
  // tools.
  static constexpr std::size_t kJobCountMax = 256;

  explicit IoThread(asio::io_context& context) : context_(context) {}
  Status post(Job job);
  void loop();

  asio::io_context& context_;
  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::unique_ptr<uring::IoBackend> backend_;
  std::string fallback_reason_;
  std::thread thread_;
};

template <class T>
Task<T> IoThread::run(std::function<Result<T>(uring::IoBackend&)> job) {
  // Lives on the Asio thread; the I/O thread only posts into it.
  struct Answer {
    explicit Answer(asio::io_context& context) : arrived(context) {}
    Signal arrived;
    std::optional<Result<T>> result;
  };
  auto answer = std::make_shared<Answer>(context_);
  Job wrapped = [&context = context_, answer, job = std::move(job)](uring::IoBackend& io) {
    asio::post(context, [answer, result = job(io)]() mutable {
      answer->result.emplace(std::move(result));
      answer->arrived.notify();
    });
  };
  auto posted = post(std::move(wrapped));
  if (!posted) co_return std::move(posted).error();
  while (!answer->result) co_await answer->arrived.wait();
  co_return *std::move(answer->result);
}

}  // namespace stillframe::daemon
