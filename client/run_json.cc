#include "client/run_json.h"

#include <map>
#include <utility>
#include <vector>

#include "base/text.h"
#include "catalog/run.h"
#include "format/json.h"
#include "format/manifest_text.h"
#include "uring/io_backend.h"

namespace stillframe::client {

namespace {

struct Entry {
  std::uint64_t sequence = 0;
  std::int64_t step = 0;
  std::string_view path;
  std::uint64_t bytes = 0;
  std::int64_t wall_ns = 0;
  const std::map<std::string, double>* metrics = nullptr;
  const std::vector<format::BestRule>* best_rules = nullptr;
  const std::vector<std::string>* tags = nullptr;
  const Error* damage = nullptr;
};

void append_entry(std::string& json, const Entry& entry) {
  json += concat("{\"sequence\": ", entry.sequence, ", \"step\": ", entry.step, ", \"path\": ");
  format::append_json_string(json, entry.path);
  json +=
      concat(", \"bytes\": ", entry.bytes, ", \"wall_ns\": ", entry.wall_ns, ", \"metrics\": {");
  const char* separator = "";
  if (entry.metrics != nullptr) {
    for (const auto& [name, value] : *entry.metrics) {
      json += separator;
      format::append_json_string(json, name);
      json += concat(": ", format::metric_text(value));
      separator = ", ";
    }
  }
  json += "}, \"best\": [";
  separator = "";
  if (entry.best_rules != nullptr) {
    for (const format::BestRule& rule : *entry.best_rules) {
      json += concat(separator, "{\"metric\": ");
      format::append_json_string(json, rule.metric);
      json += concat(", \"mode\": \"", rule.mode == format::BestMode::kMin ? "min" : "max", "\"}");
      separator = ", ";
    }
  }
  json += "], \"tags\": [";
  separator = "";
  for (const std::string& tag : *entry.tags) {
    json += separator;
    format::append_json_string(json, tag);
    separator = ", ";
  }
  json += "], \"damage\": ";
  if (entry.damage == nullptr) {
    json += "null}";
    return;
  }
  format::append_json_string(json, entry.damage->message());
  json += '}';
}

Entry entry_of(const catalog::Checkpoint& checkpoint) {
  return {.sequence = checkpoint.manifest.sequence,
          .step = checkpoint.manifest.step,
          .path = checkpoint.path,
          .bytes = checkpoint.bytes(),
          .wall_ns = checkpoint.manifest.wall_ns,
          .metrics = &checkpoint.manifest.metrics,
          .best_rules = &checkpoint.manifest.best_rules,
          .tags = &checkpoint.tags,
          .damage = nullptr};
}

Entry entry_of(const catalog::DamagedCheckpoint& damaged) {
  return {.sequence = damaged.name.sequence,
          .step = damaged.name.step,
          .path = damaged.path,
          .bytes = 0,
          .wall_ns = 0,
          .metrics = nullptr,
          .best_rules = nullptr,
          .tags = &damaged.tags,
          .damage = &damaged.reason};
}

}  // namespace

Result<std::string> list_run(const std::string& run_path) {
  // Nothing but small files is read: no ring is needed.
  auto created = uring::create_backend({.choice = uring::BackendOptions::Choice::kThreads});
  if (!created) return std::move(created).error();
  auto contents = catalog::read_run(*created->backend, run_path);
  if (!contents) return std::move(contents).error();
  std::multimap<std::uint64_t, Entry> by_sequence;
  for (const auto& checkpoint : contents->checkpoints) {
    by_sequence.emplace(checkpoint.manifest.sequence, entry_of(checkpoint));
  }
  for (const auto& damaged : contents->damaged) {
    by_sequence.emplace(damaged.name.sequence, entry_of(damaged));
  }
  std::string json = "[";
  for (const auto& [sequence, entry] : by_sequence) {
    if (json.size() > 1) json += ", ";
    append_entry(json, entry);
  }
  json += ']';
  return json;
}

}  // namespace stillframe::client
