#pragma once

#include <cstdint>

namespace stillframe::testing {

// While it lives, `operator new` fails in every thread of this process: the `nth` call of it, from
// 0, and with kForEver those after it too. One at a time. Only programs that link failing_new.cc
// have an `operator new` that can fail.
class FailingNew {
 public:
  enum class How : std::uint8_t { kOnce, kForEver };
  FailingNew(std::int64_t nth, How how);
  ~FailingNew();
  FailingNew(const FailingNew&) = delete;
  FailingNew& operator=(const FailingNew&) = delete;
};

// How many calls the newest one saw, failed ones included.
std::int64_t seen_new_count();
// Whether one of them failed.
bool has_new_failed();

}  // namespace stillframe::testing
