#include "daemon/hash_pool.h"

#include <pthread.h>
#include <sys/resource.h>

#include <utility>

namespace stillframe::daemon {

namespace {

constexpr int kNice = 10;

}  // namespace

HashPool::HashPool(std::size_t thread_count) {
  for (std::size_t i = 0; i < thread_count; ++i) threads_.emplace_back([this] { loop(); });
}

HashPool::~HashPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  posted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void HashPool::post(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  posted_.notify_one();
}

void HashPool::loop() {
  (void)::pthread_setname_np(::pthread_self(), "sf-hash");
  // Of this thread alone. Checking what was written hurries nobody; where CPUs are short, capture
  // and training come first.
  (void)::setpriority(PRIO_PROCESS, 0, kNice);
  for (;;) {
    std::function<void()> job;
    {
      std::unique_lock lock(mutex_);
      posted_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

}  // namespace stillframe::daemon
