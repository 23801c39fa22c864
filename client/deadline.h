#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace stillframe::client {

// The moment after which a call has to have returned. A mandatory parameter of everything that may
// wait for the daemon (CLI-11).
class Deadline {
 public:
  static Deadline after_ms(std::uint64_t timeout_ms) {
    // A year stands for ever, and its nanoseconds still fit.
    constexpr std::uint64_t kTimeoutMsMax = std::uint64_t{366} * 24 * 3600 * 1000;
    return Deadline(std::chrono::steady_clock::now() +
                    std::chrono::milliseconds(std::min(timeout_ms, kTimeoutMsMax)));
  }

  bool has_passed() const { return std::chrono::steady_clock::now() >= time_; }

  // For poll(2): rounded up, so that a caller does not spin through the last millisecond.
  int rest_ms() const {
    const auto rest = time_ - std::chrono::steady_clock::now();
    const auto rest_ms = std::chrono::ceil<std::chrono::milliseconds>(rest).count();
    return static_cast<int>(std::clamp<std::int64_t>(rest_ms, 0, std::numeric_limits<int>::max()));
  }

  Deadline earlier_of(Deadline other) const { return Deadline(std::min(time_, other.time_)); }
  std::chrono::steady_clock::time_point time() const noexcept { return time_; }

 private:
  explicit Deadline(std::chrono::steady_clock::time_point time) : time_(time) {}

  std::chrono::steady_clock::time_point time_;
};

}  // namespace stillframe::client
