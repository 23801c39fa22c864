#pragma once

// What a run directory may hold, given what its trainers were told: the judge of every harness that
// kills, cuts or fills up. Knows nothing of files; tests/support/trainer.h reads them.

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace stillframe::testing {

// Of one run whose trainers never use a step twice. Tell it before and after each save, and judge
// whenever nobody writes.
class RunOracle {
 public:
  // 0: retention keeps everything.
  explicit RunOracle(std::uint32_t keep_last) : keep_last_(keep_last) {}

  // A save of `step` was begun; whether it became durable is not known, until told so.
  void began(std::int64_t step) { begun_.push_back(step); }
  void acknowledged(std::int64_t step) { acknowledged_.insert(step); }
  std::size_t acknowledged_count() const noexcept { return acknowledged_.size(); }
  std::int64_t newest_begun() const noexcept { return begun_.empty() ? 0 : begun_.back(); }

  enum class Retention : std::uint8_t {
    kMayLag,   // The daemon was killed, or may still be at it.
    kSettled,  // It ended in good order.
  };
  // `restorable`: steps of the complete checkpoints, by sequence, all of whose bytes are right.
  // Returns what is wrong; empty: such a directory is allowed.
  std::vector<std::string> judge(const std::vector<std::int64_t>& restorable,
                                 Retention retention) const;

 private:
  const std::uint32_t keep_last_;
  std::vector<std::int64_t> begun_;  // In their order.
  std::set<std::int64_t> acknowledged_;
};

}  // namespace stillframe::testing
