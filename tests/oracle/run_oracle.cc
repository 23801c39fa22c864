#include "tests/oracle/run_oracle.h"

#include <algorithm>
#include <iterator>

namespace stillframe::testing {

namespace {

// Beyond keep_last: the one that was just written, and the victims of one more save, which the next
// retention takes.
constexpr std::size_t kLagMax = 2;

}  // namespace

std::vector<std::string> RunOracle::judge(const std::vector<std::int64_t>& restorable,
                                          Retention retention) const {
  std::vector<std::string> complaints;
  // The place of each in the order in which they were begun.
  std::vector<std::ptrdiff_t> places;
  for (const std::int64_t step : restorable) {
    const auto found = std::ranges::find(begun_, step);
    if (found == begun_.end()) {
      complaints.push_back("step " + std::to_string(step) + " is there, which nobody saved");
      continue;
    }
    const std::ptrdiff_t place = found - begun_.begin();
    if (!places.empty() && place <= places.back()) {
      complaints.push_back("step " + std::to_string(step) + " is out of order");
    }
    places.push_back(place);
  }
  // Retention takes a checkpoint only behind keep_last newer ones, and those only behind newer
  // ones still.
  for (std::size_t place = 0; place < begun_.size(); ++place) {
    const std::int64_t step = begun_[place];
    if (!acknowledged_.contains(step) || std::ranges::find(restorable, step) != restorable.end()) {
      continue;
    }
    const auto newer = std::ranges::count_if(places, [place](std::ptrdiff_t other) {
      return other > static_cast<std::ptrdiff_t>(place);
    });
    if (keep_last_ == 0 || newer < static_cast<std::ptrdiff_t>(keep_last_)) {
      complaints.push_back("step " + std::to_string(step) + " was durable and is lost");
    }
  }
  const std::size_t allowed =
      keep_last_ + (retention == Retention::kMayLag ? kLagMax : std::size_t{0});
  if (keep_last_ != 0 && restorable.size() > allowed) {
    complaints.push_back(std::to_string(restorable.size()) + " checkpoints are kept, of " +
                         std::to_string(keep_last_) + " wanted");
  }
  return complaints;
}

}  // namespace stillframe::testing
