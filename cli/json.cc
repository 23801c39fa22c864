#include "cli/json.h"

#include <cmath>

namespace stillframe::cli {

namespace json = boost::json;

json::object metrics_json(const std::map<std::string, double>& metrics) {
  json::object object;
  for (const auto& [name, value] : metrics) {
    if (std::isnan(value)) {
      object[name] = "NaN";
    } else if (std::isinf(value)) {
      object[name] = value > 0 ? "Infinity" : "-Infinity";
    } else {
      object[name] = value;
    }
  }
  return object;
}

json::array strings_json(const std::vector<std::string>& strings) {
  json::array array;
  for (const std::string& text : strings) array.emplace_back(text);
  return array;
}

json::object describe(const catalog::RunContents& run, const catalog::Checkpoint& checkpoint) {
  json::object object;
  object["sequence"] = checkpoint.manifest.sequence;
  object["step"] = checkpoint.manifest.step;
  object["path"] = checkpoint.path;
  object["bytes"] = checkpoint.bytes();
  object["wall_ns"] = checkpoint.manifest.wall_ns;
  object["metrics"] = metrics_json(checkpoint.manifest.metrics);
  object["tags"] = strings_json(checkpoint.tags);
  object["newest"] = &checkpoint == run.newest();
  object["best"] = &checkpoint == run.best();
  object["damage"] = nullptr;
  return object;
}

json::object describe(const catalog::DamagedCheckpoint& damaged) {
  json::object object;
  object["sequence"] = damaged.name.sequence;
  object["step"] = damaged.name.step;
  object["path"] = damaged.path;
  object["tags"] = strings_json(damaged.tags);
  object["newest"] = false;
  object["best"] = false;
  object["damage"] = std::string(damaged.reason.message());
  return object;
}

void print_json(Tool& tool, const json::value& document) {
  tool.write(json::serialize(document));
  tool.write("\n");
}

}  // namespace stillframe::cli
