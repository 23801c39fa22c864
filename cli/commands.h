#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/tool.h"

// What the tool can do, a file for each command. How it is typed: cli/command_line.cc. A RUN is a
// run's directory, a CHECKPOINT what cli/address.h reads.
namespace stillframe::cli {

Result<Exit> ls(Tool& tool, const std::string& run);
Result<Exit> show(Tool& tool, const std::string& checkpoint);
Result<Exit> verify(Tool& tool, const std::string& checkpoint);
Result<Exit> restore(Tool& tool, const std::string& checkpoint, const std::string& target);
Result<Exit> rm(Tool& tool, const std::string& checkpoint, bool is_forced);
// An empty `tag` is one made of the checkpoint's sequence.
Result<Exit> pin(Tool& tool, const std::string& checkpoint, std::string tag);
Result<Exit> unpin(Tool& tool, const std::string& checkpoint, std::string tag);
Result<Exit> tag(Tool& tool, const std::string& checkpoint, const std::string& name);
Result<Exit> status(Tool& tool);
Result<Exit> doctor(Tool& tool, const std::string& directory);

struct BestRequest {
  std::string run;
  std::string metric;  // Empty: the run's own criterion.
  std::string mode;    // "min" or "max"; empty: the run's own, where the metric is its own.
  std::size_t count = 1;
};
Result<Exit> best(Tool& tool, const BestRequest& request);

struct ExportRequest {
  std::string checkpoint;
  std::string target;
  std::string format;
  std::string part = "model";
  std::string only;
  std::string shard_size = "5GB";  // As check_size() takes it.
  bool replaces = false;
};
Result<Exit> export_checkpoint(Tool& tool, const ExportRequest& request);

struct ImportRequest {
  std::string source;
  std::string run;
  std::string format;
  std::string part = "model";
  std::string only;
  std::optional<std::int64_t> step;
  std::vector<std::string> metrics;  // As check_metric() takes them.
  bool takes_any_filesystem = false;
};
Result<Exit> import_checkpoint(Tool& tool, const ImportRequest& request);

// What is wrong with "5GB", with "val_loss=0.25"; empty: nothing.
std::string check_size(const std::string& text);
std::string check_metric(const std::string& text);

}  // namespace stillframe::cli
