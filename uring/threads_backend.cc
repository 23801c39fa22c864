#include "uring/threads_backend.h"

#include <pthread.h>

#include <chrono>
#include <csignal>
#include <new>
#include <system_error>
#include <utility>

#include "base/os_error.h"
#include "base/out_of_memory.h"
#include "base/text.h"

namespace stillframe::uring {

Result<std::unique_ptr<ThreadsBackend>> ThreadsBackend::create() {
  std::unique_ptr<ThreadsBackend> backend(new ThreadsBackend());
  // A new thread inherits the mask; the process's handlers run on its own threads.
  sigset_t all;
  sigset_t before;
  (void)::sigfillset(&all);
  (void)::pthread_sigmask(SIG_SETMASK, &all, &before);
  auto started = backend->start_threads();
  (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!started) return std::move(started).error();
  return backend;
}

Status ThreadsBackend::start_threads() {
  // Before the threads, which must not be left without room for what they have done.
  finished_.reserve(kInFlightMax);
  handed_out_.reserve(kInFlightMax);
  try {
    while (threads_.size() < kThreadCount) {
      threads_.emplace_back([this] {
        (void)::pthread_setname_np(::pthread_self(), "sf-io-call");
        work();
      });
    }
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  } catch (const std::system_error& error) {
    return os_error("start I/O threads", error.code().value());
  }
  return ok();
}

ThreadsBackend::~ThreadsBackend() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  submitted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadsBackend::work() {
  for (;;) {
    Operation operation;
    {
      std::unique_lock lock(mutex_);
      submitted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      operation = std::move(queue_.front());
      queue_.pop_front();
    }
    run_to_end(operation);
    {
      const std::lock_guard lock(mutex_);
      finished_.push_back(operation.request);
    }
    ended_.notify_one();
  }
}

Status ThreadsBackend::submit(IoRequest& request) {
  if (in_flight_ >= kInFlightMax) {
    return Error(Code::kResourceExhausted, concat("io: ", in_flight_, " requests in flight of ",
                                                  kInFlightMax, "; wait for some"));
  }
  auto found = find(request.file);
  if (!found) return std::move(found).error();
  auto checked = check_request(request, (*found)->facts);
  if (!checked) return checked;
  Operation operation = begin(request, (*found)->facts, (*found)->fd.get());
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(operation));
  }
  submitted_.notify_one();
  ++in_flight_;
  return ok();
}

std::span<IoRequest* const> ThreadsBackend::wait(int timeout_ms) {
  handed_out_.clear();
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return woken_ || !finished_.empty(); };
  if (timeout_ms < 0) {
    ended_.wait(lock, ready);
  } else {
    (void)ended_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready);
  }
  woken_ = false;
  handed_out_.swap(finished_);
  in_flight_ -= handed_out_.size();
  return handed_out_;
}

void ThreadsBackend::wake() noexcept {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  ended_.notify_one();
}

Status ThreadsBackend::register_memory(Bytes memory) {
  return Error(Code::kUnavailable, concat("register ", memory.size(),
                                          " bytes of memory: the threads backend has no table"));
}

}  // namespace stillframe::uring
