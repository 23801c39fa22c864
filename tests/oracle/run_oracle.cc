#include "tests/oracle/run_oracle.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace stillframe::testing {

namespace {

// Beyond keep_last: the one that was just written, and the victims of one more save, which the next
// retention takes.
constexpr std::size_t kLagMax = 2;

std::string say(std::int64_t step, std::string_view what) {
  return "step " + std::to_string(step) + " " + std::string(what);
}

}  // namespace

void RunOracle::began(std::int64_t step) {
  if (begun_.empty() || begun_.back() != step) begun_.push_back(step);
}

bool RunOracle::note(std::string_view word, std::int64_t step) {
  using Deed = void (RunOracle::*)(std::int64_t);
  static constexpr std::pair<std::string_view, Deed> kDeeds[] = {
      {"begin", &RunOracle::began},         {"durable", &RunOracle::acknowledged},
      {"removing", &RunOracle::removing},   {"removed", &RunOracle::removed},
      {"pinning", &RunOracle::pinning},     {"pinned", &RunOracle::pinned},
      {"unpinning", &RunOracle::unpinning}, {"unpinned", &RunOracle::unpinned},
      {"harmed", &RunOracle::harmed}};
  const auto* const found =
      std::ranges::find(kDeeds, word, &std::pair<std::string_view, Deed>::first);
  if (found == std::end(kDeeds)) return false;
  (this->*found->second)(step);
  return true;
}

// Retention takes a checkpoint only behind keep_last newer ones, and those only behind newer ones
// still; some of them may have been removed since.
bool RunOracle::may_be_missing(std::size_t place,
                               const std::vector<std::int64_t>& restorable) const {
  const std::int64_t step = begun_[place];
  if (!acknowledged_.contains(step) || removing_.contains(step) || harmed_.contains(step)) {
    return true;
  }
  if (keep_last_ == 0 || pinned_.contains(step)) return false;
  const auto was_there = [&](std::int64_t newer) {
    return std::ranges::find(restorable, newer) != restorable.end() ||
           (acknowledged_.contains(newer) && removing_.contains(newer));
  };
  const auto newer = std::count_if(begun_.begin() + static_cast<std::ptrdiff_t>(place) + 1,
                                   begun_.end(), was_there);
  return newer >= static_cast<std::ptrdiff_t>(keep_last_);
}

std::vector<std::string> RunOracle::judge(const std::vector<std::int64_t>& restorable,
                                          Retention retention) const {
  std::vector<std::string> complaints;
  // The place of each in the order in which they were begun.
  std::ptrdiff_t last_place = -1;
  for (const std::int64_t step : restorable) {
    const auto found = std::ranges::find(begun_, step);
    if (found == begun_.end()) {
      complaints.push_back(say(step, "is there, which nobody saved"));
      continue;
    }
    const std::ptrdiff_t place = found - begun_.begin();
    if (place <= last_place) complaints.push_back(say(step, "is out of order"));
    last_place = place;
    if (removed_.contains(step)) complaints.push_back(say(step, "was removed and is there"));
  }
  for (std::size_t place = 0; place < begun_.size(); ++place) {
    const std::int64_t step = begun_[place];
    if (std::ranges::find(restorable, step) == restorable.end() &&
        !may_be_missing(place, restorable)) {
      complaints.push_back(say(step, "was durable and is lost"));
    }
  }
  const std::size_t allowed = keep_last_ + maybe_pinned_.size() +
                              (retention == Retention::kMayLag ? kLagMax : std::size_t{0});
  if (keep_last_ != 0 && restorable.size() > allowed) {
    complaints.push_back(std::to_string(restorable.size()) + " checkpoints are kept, of " +
                         std::to_string(keep_last_) + " wanted");
  }
  return complaints;
}

std::vector<std::string> RunOracle::judge_pins(const std::set<std::int64_t>& pinned) const {
  std::vector<std::string> complaints;
  for (const std::int64_t step : pinned_) {
    if (!pinned.contains(step)) complaints.push_back(say(step, "has lost its pin"));
  }
  for (const std::int64_t step : pinned) {
    if (!maybe_pinned_.contains(step)) complaints.push_back(say(step, "has a pin of nobody"));
  }
  return complaints;
}

}  // namespace stillframe::testing
