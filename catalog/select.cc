// What latest, best, a sequence, a step and a tag name. Pure: works on a scan.
#include <algorithm>
#include <cmath>
#include <utility>

#include "base/text.h"
#include "catalog/run.h"

namespace stillframe::catalog {

namespace {

bool is_named(format::CheckpointName name, const std::vector<std::string>& tags,
              const format::Selector& selector) {
  switch (selector.kind) {
    case format::Selector::Kind::kLatest: return true;
    case format::Selector::Kind::kBest: return false;
    case format::Selector::Kind::kSequence: return name.sequence == selector.sequence;
    case format::Selector::Kind::kStep: return name.step == selector.step;
    case format::Selector::Kind::kTag:
      return std::find(tags.begin(), tags.end(), selector.tag) != tags.end();
  }
  return false;
}

std::string what_there_is(const RunContents& contents) {
  std::string text;
  if (contents.checkpoints.empty()) {
    text = "it holds no checkpoint";
  } else {
    const Checkpoint& oldest = contents.checkpoints.front();
    const Checkpoint& newest = contents.checkpoints.back();
    text = concat("it holds ", contents.checkpoints.size(), " from sequence ",
                  oldest.manifest.sequence, " (step ", oldest.manifest.step, ") to ",
                  newest.manifest.sequence, " (step ", newest.manifest.step, ")");
  }
  if (!contents.damaged.empty()) {
    text += concat(" and ", contents.damaged.size(), " damaged");
  }
  return text;
}

std::string criteria_there(const RunContents& contents) {
  std::string text;
  for (const format::BestRule& rule : contents.newest()->manifest.best_rules) {
    text += concat(text.empty() ? "" : ", ", rule.metric);
  }
  return text.empty() ? "none" : text;
}

}  // namespace

std::uint64_t Checkpoint::bytes() const noexcept {
  std::uint64_t sum = 0;
  for (const format::ManifestPart& part : manifest.parts) sum += part.bytes;
  return sum;
}

const Checkpoint* RunContents::newest() const noexcept {
  return checkpoints.empty() ? nullptr : &checkpoints.back();
}

const Checkpoint* RunContents::best(const format::BestRule* rule) const {
  if (rule == nullptr) rule = best_rule("");
  if (rule == nullptr) return nullptr;
  const auto best_first = ranked(*rule);
  return best_first.empty() ? nullptr : best_first.front();
}

const format::BestRule* RunContents::best_rule(std::string_view metric) const {
  if (checkpoints.empty()) return nullptr;
  for (const format::BestRule& rule : checkpoints.back().manifest.best_rules) {
    if (metric.empty() || rule.metric == metric) return &rule;
  }
  return nullptr;
}

std::vector<const Checkpoint*> RunContents::ranked(const format::BestRule& rule) const {
  std::vector<std::pair<double, const Checkpoint*>> valued;
  for (const Checkpoint& checkpoint : checkpoints) {
    const auto metric = checkpoint.manifest.metrics.find(rule.metric);
    if (metric == checkpoint.manifest.metrics.end() || std::isnan(metric->second)) continue;
    valued.emplace_back(metric->second, &checkpoint);
  }
  std::sort(valued.begin(), valued.end(), [&rule](const auto& a, const auto& b) {
    if (a.first != b.first) {
      return rule.mode == format::BestMode::kMin ? a.first < b.first : a.first > b.first;
    }
    return a.second->manifest.sequence > b.second->manifest.sequence;
  });
  std::vector<const Checkpoint*> best_first;
  for (const auto& [value, checkpoint] : valued) best_first.push_back(checkpoint);
  return best_first;
}

Result<const Checkpoint*> select(const RunContents& contents, const format::Selector& selector) {
  const Checkpoint* found = nullptr;
  if (selector.kind == format::Selector::Kind::kBest) {
    const format::BestRule* const rule = contents.best_rule(selector.metric);
    if (rule == nullptr && !selector.metric.empty() && contents.newest() != nullptr) {
      return Error(Code::kNotFound,
                   concat(contents.path, " has no criterion for ", selector.metric, "; it has ",
                          criteria_there(contents), "; stillframe best --metric --mode takes any"));
    }
    if (rule != nullptr) found = contents.best(rule);
  } else {
    for (const Checkpoint& checkpoint : contents.checkpoints) {
      const format::CheckpointName name{.sequence = checkpoint.manifest.sequence,
                                        .step = checkpoint.manifest.step};
      if (is_named(name, checkpoint.tags, selector)) found = &checkpoint;
    }
  }
  if (found != nullptr) return found;

  for (const DamagedCheckpoint& damaged : contents.damaged) {
    if (!is_named(damaged.name, damaged.tags, selector)) continue;
    return Error(Code::kDataLoss, concat(contents.path, '@', format::to_text(selector), ": ",
                                         damaged.path, ": ", damaged.reason.message()));
  }
  if (selector.kind == format::Selector::Kind::kTag &&
      std::find(contents.damaged_tags.begin(), contents.damaged_tags.end(), selector.tag) !=
          contents.damaged_tags.end()) {
    return Error(Code::kDataLoss,
                 concat(contents.path, ": the file of tag ", selector.tag, " is damaged"));
  }
  if (contents.run_id.empty()) {
    return Error(Code::kNotFound, concat(contents.path, " is not a run of Stillframe"));
  }
  return Error(Code::kNotFound, concat(contents.path, '@', format::to_text(selector),
                                       ": no such checkpoint; ", what_there_is(contents)));
}

}  // namespace stillframe::catalog
