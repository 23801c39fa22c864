#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <list>
#include <utility>

#include "base/check.h"
#include "base/result.h"

namespace stillframe::daemon {

namespace asio = boost::asio;

// A coroutine of the control plane: runs on the one Asio thread, ends with a value or an Error.
// GCC 12 destroys some temporaries beside co_await twice, so: name it, then move it.
template <class T>
using Task = asio::awaitable<Result<T>>;

// Wakes coroutines of the Asio thread. notify() ends every wait() that is under way; it leaves no
// mark, so a waiter checks its condition before and after.
class Signal {
 public:
  explicit Signal(asio::io_context& context) : context_(context) {}
  Signal(const Signal&) = delete;
  Signal& operator=(const Signal&) = delete;
  ~Signal() { check(waiters_.empty(), "a Signal died under a waiting coroutine"); }

  void notify() {
    for (asio::steady_timer* waiter : waiters_) waiter->cancel();
  }

  // Returns at notify() or at `deadline`, whichever is first. The Signal outlives the coroutine.
  asio::awaitable<void> wait(std::chrono::steady_clock::time_point deadline);
  asio::awaitable<void> wait() { return wait(std::chrono::steady_clock::time_point::max()); }

 private:
  asio::io_context& context_;
  std::list<asio::steady_timer*> waiters_;
};

// Starts coroutines and is joined before it dies, so that none outlives what it refers to.
class TaskScope {
 public:
  explicit TaskScope(asio::io_context& context) : context_(context), changed_(context) {}
  ~TaskScope() { check(running_count_ == 0, "a TaskScope died before its tasks were joined"); }

  void spawn(asio::awaitable<void> task) {
    ++running_count_;
    asio::co_spawn(context_, std::move(task), [this](const std::exception_ptr& error) {
      check(error == nullptr, "an exception left a task");
      --running_count_;
      changed_.notify();
      if (on_end_) on_end_();
    });
  }

  // Told after each task that ended.
  void set_on_end(std::function<void()> on_end) { on_end_ = std::move(on_end); }

  std::size_t running_count() const noexcept { return running_count_; }

  // Waits for every task to end; does not ask them to.
  asio::awaitable<void> join();

 private:
  asio::io_context& context_;
  Signal changed_;
  std::size_t running_count_ = 0;
  std::function<void()> on_end_;
};

}  // namespace stillframe::daemon
