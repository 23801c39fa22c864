#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/text.h"
#include "cli/address.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

// Also when there is none: what to ask for instead.
std::string metrics_there(const catalog::RunContents& run) {
  std::set<std::string> names;
  for (const catalog::Checkpoint& checkpoint : run.checkpoints) {
    for (const auto& [name, value] : checkpoint.manifest.metrics) names.insert(name);
  }
  return names.empty() ? "no checkpoint of it has metrics"
                       : fmt::format("its metrics are {}", fmt::join(names, ", "));
}

Result<format::BestRule> rule_of(const catalog::RunContents& run, const BestRequest& request) {
  const format::BestRule* const own = run.best_rule(request.metric);
  if (request.metric.empty() && own == nullptr) {
    return Error(Code::kInvalidArgument, concat(request.run,
                                                " has no criterion of its own; name one: "
                                                "--metric NAME --mode min|max; ",
                                                metrics_there(run)));
  }
  format::BestRule rule =
      own != nullptr ? *own : format::BestRule{.metric = request.metric, .mode = {}};
  if (request.mode.empty() && own == nullptr) {
    return Error(Code::kInvalidArgument,
                 concat("--metric ", request.metric, ": say by --mode min or max which is better"));
  }
  if (!request.mode.empty()) {
    rule.mode = request.mode == "min" ? format::BestMode::kMin : format::BestMode::kMax;
  }
  return rule;
}

}  // namespace

Result<Exit> best(Tool& tool, const BestRequest& request) {
  auto address = read_address(request.run);
  if (!address) return std::move(address).error();
  if (!address->is_run_alone) {
    return Error(Code::kInvalidArgument, concat(request.run, ": name a run, without a selector"));
  }
  auto run = open_run(tool, address->run_path);
  if (!run) return std::move(run).error();
  auto rule = rule_of(*run, request);
  if (!rule) return std::move(rule).error();
  auto ranked = run->ranked(*rule);
  if (ranked.empty()) {
    return Error(Code::kNotFound, concat(address->run_path, ": no checkpoint has a number for ",
                                         rule->metric, "; ", metrics_there(*run)));
  }
  ranked.resize(std::min(ranked.size(), request.count));

  const std::string_view mode = rule->mode == format::BestMode::kMin ? "min" : "max";
  if (tool.options().as_json) {
    json::array checkpoints;
    for (const catalog::Checkpoint* one : ranked) checkpoints.push_back(describe(*run, *one));
    print_json(tool, json::object{{"metric", rule->metric},
                                  {"mode", mode},
                                  {"checkpoints", std::move(checkpoints)}});
    return Exit::kDone;
  }
  for (const catalog::Checkpoint* one : ranked) {
    tool.print("{}  sequence {}  step {}  {}={}\n", one->path, one->manifest.sequence,
               one->manifest.step, one_line(rule->metric),
               one->manifest.metrics.find(rule->metric)->second);
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
