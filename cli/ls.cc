#include <algorithm>
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

void print_as_json(Tool& tool, const catalog::RunContents& run) {
  json::object document;
  document["run"] = run.path;
  document["run_id"] = run.run_id;
  json::array checkpoints;
  for (const auto& checkpoint : run.checkpoints) checkpoints.push_back(describe(run, checkpoint));
  for (const auto& damaged : run.damaged) checkpoints.push_back(describe(damaged));
  std::stable_sort(checkpoints.begin(), checkpoints.end(), [](const auto& a, const auto& b) {
    return a.at("sequence").as_uint64() < b.at("sequence").as_uint64();
  });
  document["checkpoints"] = std::move(checkpoints);
  document["damaged_tags"] = strings_json(run.damaged_tags);
  print_json(tool, document);
}

void print_as_table(Tool& tool, const catalog::RunContents& run) {
  if (run.checkpoints.empty()) {
    tool.print("{} holds no checkpoint yet\n", run.path);
  } else {
    std::vector<std::vector<std::string>> rows = {
        {"", "SEQUENCE", "STEP", "SIZE", "AGE", "METRICS", "TAGS"}};
    const std::int64_t now_ns = tool.clock().wall_ns();
    for (const catalog::Checkpoint& checkpoint : run.checkpoints) {
      const format::Manifest& manifest = checkpoint.manifest;
      std::vector<std::string> marks = checkpoint.tags;
      if (&checkpoint == run.best()) marks.insert(marks.begin(), "best");
      if (&checkpoint == run.newest()) marks.insert(marks.begin(), "latest");
      rows.push_back({&checkpoint == run.newest() ? "*" : "", concat(manifest.sequence),
                      concat(manifest.step), human_bytes(checkpoint.bytes()),
                      human_age(now_ns - manifest.wall_ns), human_metrics(manifest.metrics),
                      joined(marks, " ")});
    }
    tool.write(table(rows, "<>>>><<"));
  }
  for (const catalog::DamagedCheckpoint& damaged : run.damaged) {
    tool.print("{} {}: {}\n", tool.bad("DAMAGED"), damaged.path,
               one_line(damaged.reason.message()));
  }
  for (const std::string& tag : run.damaged_tags) {
    tool.print("{} tag {}: its file cannot be read; nothing is removed by retention meanwhile\n",
               tool.bad("DAMAGED"), one_line(tag));
  }
}

}  // namespace

Result<Exit> ls(Tool& tool, const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto run = open_run(tool, address->run_path);
  if (!run) return std::move(run).error();
  if (tool.options().as_json) {
    print_as_json(tool, *run);
  } else {
    print_as_table(tool, *run);
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
