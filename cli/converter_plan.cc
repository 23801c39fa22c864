// The answer of `stillframe.convert plan`, a JSON document:
//
//   {"files": [path, ...],
//    "parts": [{"name": text, "metadata": {text: text},
//               "tensors": [{"name": text, "dtype": "F32", "shape": [2, 3],
//                            "segments": [[file index or -1, offset, bytes], ...]}]}],
//    "state": text, "step": number or null, "metrics": [[name, decimal], ...], "framework": text,
//    "python_version": text, "notes": [text, ...]}
#include <boost/json.hpp>
#include <charconv>
#include <stdexcept>
#include <utility>

#include "base/text.h"
#include "cli/foreign_files.h"
#include "format/tensor.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

std::string text_of(const json::value& value) { return std::string(value.as_string()); }

// Throws what Boost.JSON throws when the document is not as said above.
ImportPlan decode(const json::value& document, std::vector<std::string>& paths) {
  ImportPlan plan;
  for (const json::value& path : document.at("files").as_array()) paths.push_back(text_of(path));
  for (const json::value& part : document.at("parts").as_array()) {
    format::PartSpec spec{.name = text_of(part.at("name")), .tensors = {}, .metadata = {}};
    for (const auto& [key, value] : part.at("metadata").as_object()) {
      spec.metadata.emplace(key, text_of(value));
    }
    auto& sources = plan.sources.emplace_back();
    for (const json::value& tensor : part.at("tensors").as_array()) {
      format::TensorSpec& made = spec.tensors.emplace_back();
      made.name = text_of(tensor.at("name"));
      const auto dtype = format::parse_dtype(tensor.at("dtype").as_string());
      if (!dtype) throw std::invalid_argument("dtype");
      made.dtype = *dtype;
      for (const json::value& size : tensor.at("shape").as_array()) {
        made.shape.push_back(size.to_number<std::uint64_t>());
      }
      std::vector<Segment>& segments = sources[made.name];
      for (const json::value& segment : tensor.at("segments").as_array()) {
        const auto file = segment.at(0).to_number<std::int64_t>();
        segments.push_back({.file = file < 0 ? paths.size() : static_cast<std::size_t>(file),
                            .offset = segment.at(1).to_number<std::uint64_t>(),
                            .bytes = segment.at(2).to_number<std::uint64_t>()});
      }
    }
    plan.checkpoint.parts.push_back(std::move(spec));
  }
  plan.checkpoint.state_json = text_of(document.at("state"));
  plan.checkpoint.framework = text_of(document.at("framework"));
  plan.checkpoint.python_version = text_of(document.at("python_version"));
  if (!document.at("step").is_null()) plan.step = document.at("step").to_number<std::int64_t>();
  for (const json::value& metric : document.at("metrics").as_array()) {
    const std::string digits = text_of(metric.at(1));
    double value = 0;
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (parsed.ec != std::errc()) throw std::invalid_argument("metric");
    plan.checkpoint.metrics[text_of(metric.at(0))] = value;
  }
  for (const json::value& note : document.at("notes").as_array()) {
    plan.notes.push_back(text_of(note));
  }
  return plan;
}

}  // namespace

Result<ImportPlan> plan_from_converter(const std::string& answer, UniqueFd scratch) {
  ImportPlan plan;
  std::vector<std::string> paths;
  try {
    plan = decode(json::parse(answer), paths);
  } catch (const std::exception& error) {
    return Error(Code::kInternal, concat("the converter's answer: ", error.what()));
  }
  for (const std::string& path : paths) {
    auto file = ForeignFile::open(path);
    if (!file) return std::move(file).error();
    plan.files.push_back(*std::move(file));
  }
  auto file = ForeignFile::of_scratch(std::move(scratch));
  if (!file) return std::move(file).error();
  plan.files.push_back(*std::move(file));
  return plan;
}

}  // namespace stillframe::cli
