#include "format/manifest.h"

#include <array>
#include <charconv>
#include <cmath>
#include <set>

#include "base/hash.h"
#include "base/text.h"
#include "format/json.h"
#include "format/manifest_text.h"
#include "format/names.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

constexpr std::size_t kVersionBytesMax = 256;

std::string quoted(std::string_view text) {
  std::string json;
  append_json_string(json, text);
  return json;
}

template <class Number>
std::string optional_number(const std::optional<Number>& number) {
  return number ? concat(*number) : "null";
}

std::string metrics_text(const std::map<std::string, double>& metrics) {
  std::string json = "{";
  for (const auto& [name, value] : metrics) {
    if (json.size() > 1) json.append(", ");
    json.append(concat(quoted(name), ": ", metric_text(value)));
  }
  return json + "}";
}

std::string best_rules_text(const std::vector<BestRule>& rules) {
  std::string json = "[";
  for (const BestRule& rule : rules) {
    if (json.size() > 1) json.append(", ");
    json.append(concat("{\"metric\": ", quoted(rule.metric), ", \"mode\": \"",
                       rule.mode == BestMode::kMin ? "min" : "max", "\"}"));
  }
  return json + "]";
}

std::string file_text(std::string_view file, std::uint64_t bytes, std::string_view hash_key,
                      Hash128 hash) {
  return concat("{\"file\": ", quoted(file), ", \"bytes\": ", bytes, ", \"", hash_key, "\": \"",
                to_hex(hash), "\"}");
}
std::string text_of(const ManifestPart& part) {
  return file_text(part.file, part.bytes, "root", part.root);
}
std::string text_of(const ManifestFile& file) {
  return file_text(file.file, file.bytes, "hash", file.hash);
}

template <class Entry>
std::string list_text(const std::vector<Entry>& entries) {
  std::string json = "[";
  for (const Entry& entry : entries) {
    json.append(json.size() > 1 ? ",\n    " : "\n    ");
    json.append(text_of(entry));
  }
  return json + (entries.empty() ? "]" : "\n  ]");
}

Error bad(std::string_view what) { return Error(Code::kInvalidArgument, std::string(what)); }

bool is_short_text(std::string_view text, std::size_t bytes_max) {
  return text.size() <= bytes_max && is_plain_utf8(text);
}

Status check_files(const Manifest& manifest) {
  std::set<std::string_view> names;
  for (const ManifestPart& part : manifest.parts) {
    if (!parse_part_file_name(part.file, manifest.world_size)) {
      return bad(concat("parts: ", printable(part.file), " is no part of world size ",
                        manifest.world_size));
    }
    if (!names.insert(part.file).second) {
      return bad(concat("parts: ", printable(part.file), " occurs twice"));
    }
  }
  if (manifest.sums.file != kSumsName) {
    return bad(concat("sums: ", printable(manifest.sums.file), " is not ", kSumsName));
  }
  std::optional<std::uint32_t> previous_rank;
  for (const ManifestFile& state : manifest.states) {
    const auto rank = parse_state_file_name(state.file, manifest.world_size);
    if (!rank) {
      return bad(concat("states: ", printable(state.file), " is no state of world size ",
                        manifest.world_size));
    }
    if (previous_rank && *rank <= *previous_rank) return bad("states: not in the order of ranks");
    if (state.bytes > kStateBytesMax) {
      return bad(
          concat("states: ", state.file, " has ", state.bytes, " bytes, at most ", kStateBytesMax));
    }
    previous_rank = rank;
  }
  return ok();
}

}  // namespace

ManifestFile describe_file(std::string_view file, std::string_view bytes) {
  return {.file = std::string(file), .bytes = bytes.size(), .hash = hash128(bytes)};
}

std::string metric_text(double value) {
  if (std::isnan(value)) return "\"NaN\"";
  if (std::isinf(value)) return value > 0 ? "\"Infinity\"" : "\"-Infinity\"";
  std::string text = concat(value);
  // "1" would read back as an integer elsewhere, and "-0" as 0.
  if (text.find_first_of(".e") == std::string::npos) text.append(".0");
  return text;
}

Status check_manifest(const Manifest& manifest) {
  if (manifest.run_id.size() != 32 || !parse_hash128(manifest.run_id)) {
    return bad(concat("run_id: ", printable(manifest.run_id), " is not 32 hexadecimal digits"));
  }
  if (manifest.previous_sequence && *manifest.previous_sequence >= manifest.sequence) {
    return bad(concat("previous_sequence: ", *manifest.previous_sequence, " is not before ",
                      manifest.sequence));
  }
  if (manifest.step < 0) return bad(concat("step: ", manifest.step, " is negative"));
  if (manifest.world_size == 0) return bad("world_size: 0");
  for (const auto& [name, value] : manifest.metrics) {
    if (!is_metric_name(name)) {
      return bad(concat("metrics: ", printable(name),
                        " is not a name of 1 to 256 bytes of UTF-8 without control characters"));
    }
  }
  std::set<std::string_view> best_metrics;
  for (const BestRule& rule : manifest.best_rules) {
    if (!is_metric_name(rule.metric)) {
      return bad(concat("best: ", printable(rule.metric), " is not a name"));
    }
    if (!best_metrics.insert(rule.metric).second) {
      return bad(concat("best: ", printable(rule.metric), " stands twice"));
    }
  }
  for (const auto& version :
       {manifest.stillframe_version, manifest.framework, manifest.python_version}) {
    if (!is_short_text(version, kVersionBytesMax)) {
      return bad(concat("version ", printable(version), " is not at most ", kVersionBytesMax,
                        " bytes of UTF-8 without control characters"));
    }
  }
  return check_files(manifest);
}

std::string encode_manifest(const Manifest& manifest) {
  // One line a member, so that `diff` and people can read it. The decoder compares with this very
  // text, so a change here is a new format version.
  std::string text = concat(
      kManifestStart, kFormatVersion, ",\n  \"run_id\": ", quoted(manifest.run_id),
      ",\n  \"sequence\": ", manifest.sequence,
      ",\n  \"previous_sequence\": ", optional_number(manifest.previous_sequence),
      ",\n  \"step\": ", manifest.step, ",\n  \"world_size\": ", manifest.world_size,
      ",\n  \"wall_ns\": ", manifest.wall_ns, ",\n  \"metrics\": ", metrics_text(manifest.metrics),
      ",\n  \"best\": ", best_rules_text(manifest.best_rules),
      ",\n  \"stillframe_version\": ", quoted(manifest.stillframe_version),
      ",\n  \"framework\": ", quoted(manifest.framework),
      ",\n  \"python_version\": ", quoted(manifest.python_version),
      ",\n  \"has_pickle\": ", manifest.has_pickle ? "true" : "false",
      ",\n  \"parts\": ", list_text(manifest.parts), ",\n  \"sums\": ", text_of(manifest.sums),
      ",\n  \"states\": ", list_text(manifest.states), ",\n  ");
  const std::string checksum = to_hex(hash128(text));
  return concat(text, kChecksumStart, checksum, kChecksumEnd);
}

}  // namespace stillframe::format
