#include "base/clock.h"

#include <ctime>

namespace stillframe {

namespace {

std::int64_t read_ns(clockid_t id) noexcept {
  timespec now{};
  (void)::clock_gettime(id, &now);  // Fails only for an unknown clock id.
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

std::int64_t SystemClock::monotonic_ns() const noexcept { return read_ns(CLOCK_MONOTONIC); }

std::int64_t SystemClock::wall_ns() const noexcept { return read_ns(CLOCK_REALTIME); }

}  // namespace stillframe
