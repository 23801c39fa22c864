#pragma once

#include <cstdint>

namespace stillframe {

// The only way to the time of day and to durations, so that a test can own both.
class Clock {
 public:
  virtual ~Clock() = default;
  // CLOCK_MONOTONIC: for deadlines and durations. The same in every process of one boot.
  virtual std::int64_t monotonic_ns() const noexcept = 0;
  // CLOCK_REALTIME, for people to read. Nothing is ordered by it: clocks step (DUR-12).
  virtual std::int64_t wall_ns() const noexcept = 0;
};

class SystemClock final : public Clock {
 public:
  std::int64_t monotonic_ns() const noexcept override;
  std::int64_t wall_ns() const noexcept override;
};

}  // namespace stillframe
