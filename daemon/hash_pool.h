#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace stillframe::daemon {

// Threads that hash what was written, so that neither the control plane nor a ring waits for it.
// One XXH3 thread keeps up with about 10 GB/s, more than one drive writes.
class HashPool {
 public:
  explicit HashPool(std::size_t thread_count);
  ~HashPool();  // Finishes what was posted, then joins.
  HashPool(const HashPool&) = delete;
  HashPool& operator=(const HashPool&) = delete;

  // Any thread. Unbounded on purpose: each writer has at most its writes in flight here, 4 of 4
  // MiB.
  void post(std::function<void()> job);

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace stillframe::daemon
