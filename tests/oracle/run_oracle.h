#pragma once

// What a run directory may hold, given what its trainers were told: the judge of every harness that
// kills, cuts, fails or fills up. Knows nothing of files; tests/support/trainer.h reads them.

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace stillframe::testing {

// Of one run whose trainers never use a step twice, but for one that failed. Tell it before and
// after each deed, and judge whenever nobody writes. A deed that was begun and not confirmed may
// have been done or not.
class RunOracle {
 public:
  // 0: retention keeps everything.
  explicit RunOracle(std::uint32_t keep_last) : keep_last_(keep_last) {}

  // A save of `step` was begun; whether it became durable is not known, until told so.
  void began(std::int64_t step);
  void acknowledged(std::int64_t step) { acknowledged_.insert(step); }
  // The removal of a checkpoint that somebody asked for, not retention.
  void removing(std::int64_t step) { removing_.insert(step); }
  void removed(std::int64_t step) { removed_.insert(step); }
  // A pin, or any tag: retention leaves the checkpoint alone.
  void pinning(std::int64_t step) { maybe_pinned_.insert(step); }
  void pinned(std::int64_t step) { pinned_.insert(step); }
  void unpinning(std::int64_t step) { pinned_.erase(step); }
  void unpinned(std::int64_t step) { maybe_pinned_.erase(step); }
  // The drive broke its word about these bytes: the checkpoint may be lost, and no other.
  void harmed(std::int64_t step) { harmed_.insert(step); }

  // The same by the words that a process prints: "begin", "durable", and those above. False: no
  // such word.
  bool note(std::string_view word, std::int64_t step);

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
  // The same of the pins. `pinned`: steps of those that carry one.
  std::vector<std::string> judge_pins(const std::set<std::int64_t>& pinned) const;

 private:
  bool may_be_missing(std::size_t place, const std::vector<std::int64_t>& restorable) const;

  std::uint32_t keep_last_;
  std::vector<std::int64_t> begun_;  // In their order.
  std::set<std::int64_t> acknowledged_;
  std::set<std::int64_t> removing_;
  std::set<std::int64_t> removed_;
  std::set<std::int64_t> maybe_pinned_;
  std::set<std::int64_t> pinned_;
  std::set<std::int64_t> harmed_;
};

}  // namespace stillframe::testing
