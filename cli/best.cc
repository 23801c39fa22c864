#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/text.h"
#include "cli/address.h"
#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

struct Wish {
  std::string run;
  std::string metric;  // Empty: the run's own criterion.
  std::string mode;    // "min" or "max"; empty: the run's own, where the metric is its own.
  std::size_t count = 1;
};

// Also when there is none: what to ask for instead.
std::string metrics_there(const catalog::RunContents& run) {
  std::set<std::string> names;
  for (const catalog::Checkpoint& checkpoint : run.checkpoints) {
    for (const auto& [name, value] : checkpoint.manifest.metrics) names.insert(name);
  }
  return names.empty() ? "no checkpoint of it has metrics"
                       : fmt::format("its metrics are {}", fmt::join(names, ", "));
}

Result<format::BestRule> rule_of(const catalog::RunContents& run, const Wish& wish) {
  const format::BestRule* const own = run.best_rule(wish.metric);
  if (wish.metric.empty() && own == nullptr) {
    return Error(Code::kInvalidArgument, concat(wish.run,
                                                " has no criterion of its own; name one: "
                                                "--metric NAME --mode min|max; ",
                                                metrics_there(run)));
  }
  format::BestRule rule =
      own != nullptr ? *own : format::BestRule{.metric = wish.metric, .mode = {}};
  if (wish.mode.empty() && own == nullptr) {
    return Error(Code::kInvalidArgument,
                 concat("--metric ", wish.metric, ": say by --mode min or max which is better"));
  }
  if (!wish.mode.empty()) {
    rule.mode = wish.mode == "min" ? format::BestMode::kMin : format::BestMode::kMax;
  }
  return rule;
}

Result<Exit> best(Tool& tool, const Wish& wish) {
  auto address = read_address(wish.run);
  if (!address) return std::move(address).error();
  if (!address->is_run_alone) {
    return Error(Code::kInvalidArgument, concat(wish.run, ": name a run, without a selector"));
  }
  auto run = open_run(tool, address->run_path);
  if (!run) return std::move(run).error();
  auto rule = rule_of(*run, wish);
  if (!rule) return std::move(rule).error();
  auto ranked = run->ranked(*rule);
  if (ranked.empty()) {
    return Error(Code::kNotFound, concat(address->run_path, ": no checkpoint has a number for ",
                                         rule->metric, "; ", metrics_there(*run)));
  }
  ranked.resize(std::min(ranked.size(), wish.count));

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

}  // namespace

void declare_best(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("best", "Name the best checkpoints of a run by a metric");
  const Argument run = add_run(*command);
  auto wish = std::make_shared<Wish>();
  command->add_option("--metric", wish->metric, "Its name; default: the run's own criterion");
  command->add_option("--mode", wish->mode, "Which is better: min or max")
      ->check(CLI::IsMember({"min", "max"}));
  command->add_option("-k,--count", wish->count, "How many, the best first")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1'000'000}));
  command->callback([&action, run, wish] {
    action = [run, wish](Tool& tool) {
      wish->run = *run;
      return best(tool, *wish);
    };
  });
}

}  // namespace stillframe::cli
