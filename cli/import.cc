// import: a new checkpoint of a run, made of files of other libraries. The files are checked, then
// the checkpoint is committed in the same steps as a save; no daemon is needed.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/hash.h"
#include "base/os_error.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/new_checkpoint.h"
#include "cli/commands.h"
#include "cli/converter.h"
#include "cli/foreign_files.h"
#include "cli/json.h"
#include "cli/progress.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

struct Metric {
  std::string name;
  double value = 0;
};

std::optional<Metric> parse_metric(std::string_view text) {
  const std::size_t equals = text.rfind('=');
  if (equals == 0 || equals == std::string_view::npos) return std::nullopt;
  Metric metric{.name = std::string(text.substr(0, equals))};
  const std::string_view digits = text.substr(equals + 1);
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), metric.value);
  if (parsed.ec != std::errc() || parsed.ptr != digits.data() + digits.size()) return std::nullopt;
  return metric;
}

// A nameless file near the run, for tensors that do not lie in one piece in the foreign files.
Result<UniqueFd> make_scratch(const std::string& run_path) {
  std::error_code failed;
  std::filesystem::path directory = std::filesystem::absolute(run_path, failed);
  while (!failed && directory.has_relative_path() && !std::filesystem::is_directory(directory)) {
    directory = directory.parent_path();
  }
  // Beside the run and not in it: nothing in a run is without a meaning.
  if (std::filesystem::equivalent(directory, run_path, failed)) directory = directory.parent_path();
  std::string path = (directory / ".stillframe-import-XXXXXX").string();
  UniqueFd fd(::mkostemp(path.data(), O_CLOEXEC));
  if (!fd) return os_error(concat("make a scratch file in ", directory.string()), errno);
  (void)::unlink(path.c_str());
  return fd;
}

struct Planned {
  Exit exit = Exit::kDone;
  ImportPlan plan;
};

Result<Planned> plan_by_converter(const ImportRequest& request) {
  auto scratch = make_scratch(request.run);
  if (!scratch) return std::move(scratch).error();
  std::vector<std::string> arguments = {"plan", "--from", request.format,
                                        concat("--source=", request.source)};
  if (!request.only.empty()) arguments.push_back(concat("--only=", request.only));
  auto answer = run_converter(arguments, scratch->get());
  if (!answer) return std::move(answer).error();
  Planned planned;
  if (answer->exit_code != 0) {
    planned.exit = static_cast<Exit>(answer->exit_code);
    return planned;
  }
  auto plan = plan_from_converter(answer->out, *std::move(scratch));
  if (!plan) return std::move(plan).error();
  planned.plan = *std::move(plan);
  return planned;
}

Result<Planned> make_plan(const ImportRequest& request) {
  if (request.format != "safetensors" && request.format != "hf") {
    return plan_by_converter(request);
  }
  auto plan = request.format == "hf" ? plan_hf(request.source)
                                     : plan_safetensors(request.source, request.part);
  if (!plan) return std::move(plan).error();
  return Planned{.exit = Exit::kDone, .plan = *std::move(plan)};
}

Status check_filesystem(const ImportRequest& request, std::vector<std::string>& notes) {
  auto verdict = catalog::judge_filesystem(request.run);
  if (!verdict) return std::move(verdict).error();
  if (verdict->kind == catalog::FilesystemVerdict::Kind::kWarned) {
    notes.push_back(
        concat(request.run, " is on ", verdict->name, ": a power cut may lose what is in it"));
  }
  if (verdict->kind != catalog::FilesystemVerdict::Kind::kRefused || request.takes_any_filesystem) {
    return ok();
  }
  return Error(Code::kInvalidArgument,
               concat(request.run, " is on ", verdict->name,
                      ", a network file system; choose a local one, or --force-filesystem"));
}

Result<catalog::Checkpoint> commit(Tool& tool, const ImportRequest& request,
                                   const ImportPlan& plan) {
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto staging = tool.staging();
  if (!staging) return std::move(staging).error();
  const Hash128 new_id{.low = tool.rng().next(), .high = tool.rng().next()};
  auto run_id = catalog::create_run(**io, request.run, to_hex(new_id));
  if (!run_id) return std::move(run_id).error();
  const std::uint64_t nonce = tool.rng().next();
  auto lock = lock_run(tool, request.run, nonce);
  if (!lock) {
    return Error(lock.error().code(),
                 concat(lock.error().message(), "; import when the training has closed the run"));
  }
  std::uint64_t bytes = 0;
  for (const auto& sources : plan.sources) {
    for (const auto& [name, segments] : sources) {
      for (const Segment& segment : segments) bytes += segment.bytes;
    }
  }
  ProgressBar bar("import", bytes);
  auto made = catalog::commit_new_checkpoint(
      **io, request.run, nonce, plan.checkpoint,
      [&plan](const catalog::TensorSlice& slice, Bytes target) { return plan.fill(slice, target); },
      *staging, [&bar](std::uint64_t written) { bar.add(written); });
  if (!made) return made;
  if (auto contents = catalog::read_run(**io, request.run)) catalog::refresh_links(**io, *contents);
  return made;
}

void report(Tool& tool, const ImportRequest& request, const ImportPlan& plan,
            const catalog::Checkpoint& made) {
  std::size_t tensor_count = 0;
  for (const format::PartSpec& part : plan.checkpoint.parts) tensor_count += part.tensors.size();
  if (tool.options().as_json) {
    print_json(tool, json::object{{"run", request.run},
                                  {"sequence", made.manifest.sequence},
                                  {"step", made.manifest.step},
                                  {"path", made.path},
                                  {"source", request.source},
                                  {"format", request.format},
                                  {"bytes", made.bytes()},
                                  {"tensors", tensor_count},
                                  {"metrics", metrics_json(made.manifest.metrics)},
                                  {"notes", strings_json(plan.notes)}});
    return;
  }
  tool.print("{} -> {}  {} tensors, {}\n", request.source, made.path, tensor_count,
             human_bytes(made.bytes()));
  for (const std::string& note : plan.notes) tool.print("note: {}\n", one_line(note));
}

}  // namespace

std::string check_metric(const std::string& text) {
  return parse_metric(text) ? std::string() : concat(text, " is no metric; such as val_loss=0.25");
}

Result<Exit> import_checkpoint(Tool& tool, const ImportRequest& request) {
  auto planned = make_plan(request);
  if (!planned) return std::move(planned).error();
  if (planned->exit != Exit::kDone) return planned->exit;
  ImportPlan& plan = planned->plan;
  plan.checkpoint.step = request.step.value_or(plan.step.value_or(0));
  plan.checkpoint.wall_ns = tool.clock().wall_ns();
  for (const std::string& text : request.metrics) {
    const Metric metric = *parse_metric(text);
    plan.checkpoint.metrics[metric.name] = metric.value;
  }
  auto checked = plan.check();
  if (checked) checked = catalog::check_new_checkpoint(plan.checkpoint);
  if (checked) checked = check_filesystem(request, plan.notes);
  if (!checked) return std::move(checked).error();
  auto made = commit(tool, request, plan);
  if (!made) return std::move(made).error();
  report(tool, request, plan, *made);
  return Exit::kDone;
}

}  // namespace stillframe::cli
