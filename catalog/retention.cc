#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

// The `count` best, ties to the newest, NaN never.
std::set<const Checkpoint*> best_of(const RunContents& contents, const format::BestRule& rule,
                                    std::size_t count) {
  std::vector<std::pair<double, const Checkpoint*>> ranked;
  for (const Checkpoint& checkpoint : contents.checkpoints) {
    const auto metric = checkpoint.manifest.metrics.find(rule.metric);
    if (metric == checkpoint.manifest.metrics.end() || std::isnan(metric->second)) continue;
    ranked.emplace_back(metric->second, &checkpoint);
  }
  std::sort(ranked.begin(), ranked.end(), [&rule](const auto& a, const auto& b) {
    if (a.first != b.first) {
      return rule.mode == format::BestMode::kMin ? a.first < b.first : a.first > b.first;
    }
    return a.second->manifest.sequence > b.second->manifest.sequence;
  });
  ranked.resize(std::min(ranked.size(), count));
  std::set<const Checkpoint*> best;
  for (const auto& [value, checkpoint] : ranked) best.insert(checkpoint);
  return best;
}

// Points RUN/NAME to a checkpoint, or takes it away; never touches what is not a link.
void point_link(uring::IoBackend& io, const std::string& run_path, std::string_view name,
                const Checkpoint* checkpoint) {
  const std::string path = concat(run_path, '/', name);
  auto status = io.status(path);
  if (status && status->kind != uring::FileKind::kSymlink) return;
  if (!status && status.error().code() != Code::kNotFound) return;
  if (checkpoint == nullptr) {
    if (status) (void)io.unlink(path);
    return;
  }
  const std::string unfinished = concat(private_path(run_path), '/', name, kUnfinishedMark);
  (void)unlink_if_there(io, unfinished);
  STEP("links: make link");
  if (!io.make_symlink(last_component(checkpoint->path), unfinished)) return;
  STEP("links: rename link");
  if (!io.rename(unfinished, path, uring::RenameMode::kReplace)) (void)io.unlink(unfinished);
}

}  // namespace

std::vector<const Checkpoint*> choose_victims(const RunContents& contents,
                                              const RetentionPolicy& policy) {
  std::vector<const Checkpoint*> victims;
  // A tag that cannot be read may protect any of them.
  if (policy.keep_last == 0 || !contents.damaged_tags.empty()) return victims;
  if (contents.checkpoints.size() <= policy.keep_last) return victims;

  std::set<const Checkpoint*> best;
  const format::BestRule* rule = policy.rule ? &*policy.rule : nullptr;
  if (rule == nullptr && contents.newest()->manifest.best_rule) {
    rule = &*contents.newest()->manifest.best_rule;
  }
  if (rule != nullptr) best = best_of(contents, *rule, policy.keep_best);

  const std::size_t old_count = contents.checkpoints.size() - policy.keep_last;
  for (std::size_t i = 0; i < old_count; ++i) {
    const Checkpoint& checkpoint = contents.checkpoints[i];
    if (checkpoint.tags.empty() && !best.contains(&checkpoint)) victims.push_back(&checkpoint);
  }
  return victims;
}

void refresh_links(uring::IoBackend& io, const RunContents& contents) {
  point_link(io, contents.path, "latest", contents.newest());
  point_link(io, contents.path, "best", contents.best());
}

}  // namespace stillframe::catalog
