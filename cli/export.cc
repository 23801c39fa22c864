// export: a checkpoint as another library's files. safetensors and hf are written here, torch and
// dcp by `stillframe.convert`; all of them under a temporary name until they are complete and
// synced.
#include "catalog/export.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <vector>

#include "base/text.h"
#include "catalog/block_reader.h"
#include "cli/commands.h"
#include "cli/converter.h"
#include "cli/json.h"
#include "cli/model_config.h"
#include "cli/progress.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;
using catalog::ExportTarget;

// "5GB", "500MB", "2GiB", "1000000": decimal units as in huggingface_hub, binary ones with an i.
std::optional<std::uint64_t> parse_size(std::string_view text) {
  double value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (parsed.ec != std::errc() || !(value > 0)) return std::nullopt;
  const std::string_view unit(parsed.ptr, static_cast<std::size_t>(text.end() - parsed.ptr));
  constexpr std::string_view kLetters = "KMGT";
  double factor = 1;
  if (!unit.empty() && unit != "B") {
    const std::size_t power = kLetters.find(unit.front() == 'k' ? 'K' : unit.front());
    const bool is_binary = unit.substr(1) == "iB";
    if (power == std::string_view::npos || (!is_binary && unit.substr(1) != "B")) {
      return std::nullopt;
    }
    factor = std::pow(is_binary ? 1024.0 : 1000.0, static_cast<double>(power + 1));
  }
  const double bytes = value * factor;
  if (bytes < 1 || bytes > 9e18) return std::nullopt;
  return static_cast<std::uint64_t>(bytes);
}

bool is_dcp_file(std::string_view name) { return name == ".metadata" || name.ends_with(".distcp"); }

bool is_no_file(std::string_view) { return false; }

struct Outcome {
  std::uint64_t bytes = 0;
  std::vector<std::string> files;
  std::vector<std::string> notes;
};

Result<const catalog::OpenPart*> find_part(const catalog::OpenCheckpoint& opened,
                                           const std::string& name) {
  std::vector<std::string> names;
  for (const catalog::OpenPart& part : opened.parts()) {
    if (part.image.name == name) return &part;
    names.push_back(part.image.name);
  }
  return Error(Code::kNotFound, concat("the checkpoint has no part ", name,
                                       "; it has: ", joined(names, ", "), " (choose by --part)"));
}

Result<Outcome> export_here(Tool& tool, const catalog::Checkpoint& checkpoint,
                            const ExportRequest& request, const ExportTarget& target) {
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto staging = tool.staging();
  if (!staging) return std::move(staging).error();
  auto opened = catalog::OpenCheckpoint::open(**io, checkpoint);
  if (!opened) return std::move(opened).error();
  auto part = find_part(*opened, request.part);
  if (!part) return std::move(part).error();

  Outcome outcome;
  ProgressBar bar("export", (*part)->bytes);
  const catalog::Progress progress = [&bar](std::uint64_t bytes) { bar.add(bytes); };
  Result<catalog::Exported> exported = catalog::Exported();
  if (request.format == "safetensors") {
    exported = catalog::export_file(**io, **part, target, *staging, progress);
  } else {
    auto config = find_model_config(**io, *opened);
    if (!config) return std::move(config).error();
    if (!config->json) outcome.notes.push_back(config->note);
    const catalog::HfOptions options{.shard_bytes_max = *parse_size(request.shard_size),
                                     .config_json = std::move(config->json)};
    exported = catalog::export_hf(**io, **part, options, target, *staging, progress);
  }
  if (!exported) return std::move(exported).error();
  if (!exported->as_u8.empty()) {
    outcome.notes.push_back(
        concat("stored as U8, because torch cannot load their dtype from "
               "safetensors (the true one is in the metadata): ",
               joined(exported->as_u8, ", ")));
  }
  outcome.bytes = exported->bytes;
  outcome.files = std::move(exported->files);
  return outcome;
}

// nullopt: the converter has failed and said why.
struct Converted {
  Exit exit = Exit::kDone;
  Outcome outcome;
};

Result<Converted> export_by_converter(Tool& tool, const catalog::RunContents& run,
                                      const catalog::Checkpoint& checkpoint,
                                      const ExportRequest& request, const ExportTarget& target) {
  auto io = tool.io();
  if (!io) return std::move(io).error();
  std::vector<std::string> arguments = {"export", "--to", request.format,
                                        // As long options with "=", so that no path is an option.
                                        concat("--run=", run.path),
                                        concat("--sequence=", checkpoint.manifest.sequence),
                                        concat("--target=", target.partial())};
  if (!request.only.empty()) arguments.push_back(concat("--only=", request.only));
  auto answer = run_converter(arguments, -1);
  if (answer && answer->exit_code == 0) {
    auto published = target.publish(**io);
    if (!published) answer = std::move(published).error();
  }
  if (!answer || answer->exit_code != 0) target.discard(**io);
  if (!answer) return std::move(answer).error();
  Converted converted;
  if (answer->exit_code != 0) {
    converted.exit = static_cast<Exit>(answer->exit_code);
    return converted;
  }
  boost::system::error_code failed;
  const json::value document = json::parse(answer->out, failed);
  if (failed || !document.is_object()) {
    return Error(Code::kInternal, "the converter's answer is not JSON");
  }
  converted.outcome.bytes = document.at("bytes").to_number<std::uint64_t>();
  for (const json::value& file : document.at("files").as_array()) {
    converted.outcome.files.emplace_back(file.as_string());
  }
  for (const json::value& note : document.at("notes").as_array()) {
    converted.outcome.notes.emplace_back(note.as_string());
  }
  return converted;
}

void report(Tool& tool, const catalog::Checkpoint& checkpoint, const ExportRequest& request,
            const Outcome& outcome) {
  if (tool.options().as_json) {
    print_json(tool, json::object{{"sequence", checkpoint.manifest.sequence},
                                  {"step", checkpoint.manifest.step},
                                  {"source", checkpoint.path},
                                  {"target", request.target},
                                  {"format", request.format},
                                  {"bytes", outcome.bytes},
                                  {"files", strings_json(outcome.files)},
                                  {"notes", strings_json(outcome.notes)}});
    return;
  }
  tool.print("{} -> {}  {} in {} file{}, every hash checked\n", checkpoint.path, request.target,
             human_bytes(outcome.bytes), outcome.files.size(),
             outcome.files.size() == 1 ? "" : "s");
  for (const std::string& note : outcome.notes) tool.print("note: {}\n", one_line(note));
}

}  // namespace

std::string check_size(const std::string& text) {
  return parse_size(text) ? std::string() : concat(text, " is no size; such as 5GB, 500MB, 2GiB");
}

Result<Exit> export_checkpoint(Tool& tool, const ExportRequest& request) {
  auto chosen = open_checkpoint(tool, request.checkpoint);
  if (!chosen) return std::move(chosen).error();
  const catalog::Checkpoint& checkpoint = chosen->checkpoint;
  if (checkpoint.manifest.world_size > 1) {
    return Error(Code::kInvalidArgument,
                 concat(checkpoint.path, " was written by ", checkpoint.manifest.world_size,
                        " ranks; only checkpoints of one rank are exported in this version"));
  }
  auto io = tool.io();
  if (!io) return std::move(io).error();
  const bool is_here = request.format == "safetensors" || request.format == "hf";
  const bool is_file = request.format != "hf" && request.format != "dcp";
  const ExportTarget::IsOurs is_ours = request.format == "hf"    ? catalog::is_hf_file
                                       : request.format == "dcp" ? is_dcp_file
                                                                 : is_no_file;
  auto target = ExportTarget::prepare(
      **io, request.target, is_file ? ExportTarget::Kind::kFile : ExportTarget::Kind::kDirectory,
      request.replaces, is_ours);
  if (!target) return std::move(target).error();

  if (is_here) {
    auto outcome = export_here(tool, checkpoint, request, *target);
    if (!outcome) return std::move(outcome).error();
    report(tool, checkpoint, request, *outcome);
    return Exit::kDone;
  }
  auto converted = export_by_converter(tool, chosen->run, checkpoint, request, *target);
  if (!converted) return std::move(converted).error();
  if (converted->exit == Exit::kDone) report(tool, checkpoint, request, converted->outcome);
  return converted->exit;
}

}  // namespace stillframe::cli
