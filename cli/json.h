#pragma once

// What --json prints. Members are only ever added.

#include <boost/json.hpp>

#include "catalog/run.h"
#include "cli/tool.h"

namespace stillframe::cli {

// Numbers that JSON lacks become "NaN", "Infinity" and "-Infinity", as in manifest.json.
boost::json::object metrics_json(const std::map<std::string, double>& metrics);

// sequence, step, path, bytes, wall_ns, metrics, tags, newest, best, damage: as in `ls`.
boost::json::object describe(const catalog::RunContents& run,
                             const catalog::Checkpoint& checkpoint);
boost::json::object describe(const catalog::DamagedCheckpoint& damaged);

boost::json::array strings_json(const std::vector<std::string>& strings);

void print_json(Tool& tool, const boost::json::value& document);

}  // namespace stillframe::cli
