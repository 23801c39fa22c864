#include "cli/model_config.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "catalog/run_files.h"
#include "format/json.h"
#include "format/json_tree.h"

namespace stillframe::cli {

namespace {

using format::JsonValue;

constexpr std::uint64_t kConfigBytesMax = std::uint64_t{16} << 20;
// state.json is read as a tree here, so a huge one is not searched.
constexpr std::uint64_t kSearchedStateBytesMax = std::uint64_t{16} << 20;
constexpr std::size_t kDepthMax = 400;

const JsonValue* member(const JsonValue& object, std::string_view key) {
  const auto found = std::find(object.keys.begin(), object.keys.end(), key);
  if (found == object.keys.end()) return nullptr;
  return &object.items[static_cast<std::size_t>(found - object.keys.begin())];
}

bool append_value(std::string& json, const JsonValue& value, std::size_t depth);

bool append_items(std::string& json, const JsonValue& value, std::size_t depth, bool is_object) {
  json.push_back(is_object ? '{' : '[');
  for (std::size_t i = 0; i < value.items.size(); ++i) {
    json.append(i == 0 ? "\n" : ",\n").append(2 * (depth + 1), ' ');
    if (is_object) {
      format::append_json_string(json, value.keys[i]);
      json.append(": ");
    }
    if (!append_value(json, value.items[i], depth + 1)) return false;
  }
  if (!value.items.empty()) json.append("\n").append(2 * depth, ' ');
  json.push_back(is_object ? '}' : ']');
  return true;
}

// A dictionary with keys that are not texts: numbers become them, as in Python's json.
bool append_pairs(std::string& json, const JsonValue& pairs, std::size_t depth) {
  JsonValue object;
  object.kind = JsonValue::Kind::kObject;
  for (const JsonValue& pair : pairs.items) {
    if (pair.items.size() != 2) return false;
    const JsonValue& key = pair.items[0];
    if (key.kind != JsonValue::Kind::kString && key.kind != JsonValue::Kind::kNumber) return false;
    object.keys.push_back(key.text);
    object.items.push_back(pair.items[1]);
  }
  return append_items(json, object, depth, true);
}

// The typed values of state.json (docs/FORMAT.md section 5) that have a plain form.
bool append_typed(std::string& json, std::string_view kind, const JsonValue& content,
                  std::size_t depth) {
  const bool is_list = content.kind == JsonValue::Kind::kArray;
  if (is_list && (kind == "$tuple" || kind == "$set" || kind == "$size")) {
    return append_items(json, content, depth, false);
  }
  if (is_list && kind == "$dict") return append_pairs(json, content, depth);
  if (is_list && kind == "$scalar" && content.items.size() == 2) {
    return append_value(json, content.items[1], depth);
  }
  if (content.kind != JsonValue::Kind::kString) return false;
  if (kind == "$dtype" || kind == "$device") {
    format::append_json_string(json, content.text);
    return true;
  }
  if (kind != "$float") return false;
  json.append(content.text);  // NaN, Infinity, -Infinity: what Python's json writes and reads.
  return true;
}

// As json.dumps(value, indent=2) has it. False: something in it has no plain form.
bool append_value(std::string& json, const JsonValue& value, std::size_t depth) {
  switch (value.kind) {
    case JsonValue::Kind::kNull: json.append("null"); return true;
    case JsonValue::Kind::kBool: json.append(value.boolean ? "true" : "false"); return true;
    case JsonValue::Kind::kNumber: json.append(value.text); return true;
    case JsonValue::Kind::kString: format::append_json_string(json, value.text); return true;
    case JsonValue::Kind::kArray: return append_items(json, value, depth, false);
    case JsonValue::Kind::kObject:
      if (value.keys.size() == 1 && value.keys[0].starts_with('$')) {
        return append_typed(json, value.keys[0], value.items[0], depth);
      }
      return append_items(json, value, depth, true);
  }
  return false;
}

ModelConfig no_config(std::string_view why) {
  return {.json = std::nullopt,
          .note = concat("no config.json: ", why,
                         "; from_pretrained() needs the one of the model beside the weights")};
}

Result<std::optional<std::string>> beside_the_parts(uring::IoBackend& io,
                                                    const std::string& directory) {
  auto text = catalog::read_small_file(io, concat(directory, "/config.json"), kConfigBytesMax);
  if (text) return std::optional(*std::move(text));
  if (text.error().code() == Code::kNotFound) return std::optional<std::string>();
  return std::move(text).error();
}

bool has_typed_keys(const JsonValue& value) {
  return std::any_of(value.keys.begin(), value.keys.end(),
                     [](const std::string& key) { return key.starts_with('$'); }) ||
         std::any_of(value.items.begin(), value.items.end(), has_typed_keys);
}

}  // namespace

Result<ModelConfig> find_model_config(uring::IoBackend& io, const catalog::OpenCheckpoint& opened) {
  auto file = beside_the_parts(io, opened.checkpoint().path);
  if (!file) return std::move(file).error();
  if (*file) return ModelConfig{.json = **std::move(file), .note = {}};

  const std::vector<format::ManifestFile>& states = opened.checkpoint().manifest.states;
  if (states.empty() || states[0].bytes > kSearchedStateBytesMax) {
    return no_config("state.json is too large to be searched for one");
  }
  auto text = opened.read_state(0);
  if (!text) return std::move(text).error();
  auto state = format::read_json_tree(*text, kDepthMax);
  if (!state) return std::move(state).error();
  const JsonValue* const extra = member(*state, "extra");
  const JsonValue* const config = extra == nullptr ? nullptr : member(*extra, "config");
  if (config == nullptr) {
    return no_config(
        "the checkpoint carries none (save(..., extra={\"config\": "
        "model.config.to_dict()}) keeps it)");
  }
  JsonValue value = *config;
  if (config->kind == JsonValue::Kind::kString) {
    auto parsed = format::read_json_tree(config->text, kDepthMax);
    if (parsed) value = *std::move(parsed);
  }
  std::string json;
  if (value.kind != JsonValue::Kind::kObject || !append_value(json, value, 0)) {
    return no_config("extra[\"config\"] is not a dictionary of plain values");
  }
  return ModelConfig{.json = json.append("\n"), .note = {}};
}

std::optional<std::string> state_with_config(std::string_view config_json) {
  auto config = format::read_json_tree(config_json, kDepthMax / 2);
  if (!config || config->kind != JsonValue::Kind::kObject || has_typed_keys(*config)) {
    return std::nullopt;
  }
  std::string json = "{\"format_version\": 1, \"extra\": {\"config\": ";
  if (!append_value(json, *config, 0)) return std::nullopt;
  return json.append("}}\n");
}

}  // namespace stillframe::cli
