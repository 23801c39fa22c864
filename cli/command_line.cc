// Every word and flag of the tool, and the one file that sees CLI11, whose headers take longer to
// compile than all commands.
#include "cli/command_line.h"

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <utility>

#include "base/text.h"
#include "cli/address.h"
#include "cli/commands.h"
#include "format/names.h"

namespace stillframe::cli {

namespace {

constexpr const char* kFooter =
    "CHECKPOINT is RUN@latest, RUN@best, RUN@12 (a sequence), RUN@step-1200, RUN@TAG or a\n"
    "checkpoint's own directory; RUN alone is its latest. RUN is the directory of one training\n"
    "history.\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 damage found.";

// --- Arguments: what is wrong with one is found while the line is read, so that it is a usage
// error

std::string check_run(const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::string(address.error().message());
  if (address->is_run_alone) return {};
  return concat("takes a whole run, such as ", address->run_path, "; for one checkpoint: show");
}

std::string check_checkpoint(const std::string& text) {
  auto address = read_address(text);
  return address ? std::string() : std::string(address.error().message());
}

std::string check_exact_checkpoint(const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::string(address.error().message());
  if (!address->is_run_alone) return {};
  return concat("say which: ", address->run_path, "@SEQUENCE; stillframe ls ", address->run_path,
                " lists them");
}

std::string check_tag(const std::string& text) {
  auto allowed = format::check_tag(text);
  return allowed ? std::string() : std::string(allowed.error().message());
}

// RUN: a directory, without a selector.
void add_run(CLI::App& command, std::string& run) {
  command.add_option("RUN", run, "Directory of the run")->required()->check(check_run);
}

// CHECKPOINT: RUN@SELECTOR, a checkpoint's directory, or RUN alone for its latest.
void add_checkpoint(CLI::App& command, std::string& checkpoint) {
  command.add_option("CHECKPOINT", checkpoint, "Such as RUN@latest, RUN@best, RUN@12")
      ->required()
      ->check(check_checkpoint);
}

// --- Commands ------------------------------------------------------------------------------------

// Where options are put, and what is then done with them.
template <class Request>
Request& declare(CLI::App& command, Action& action,
                 std::function<Result<Exit>(Tool&, const Request&)> run) {
  auto request = std::make_shared<Request>();
  command.callback([&action, request, run = std::move(run)] {
    action = [request, run](Tool& tool) { return run(tool, *request); };
  });
  return *request;
}

void declare_readers(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("ls", "List a run's checkpoints, oldest first");
  add_run(*command, declare<std::string>(*command, action, ls));

  command = app.add_subcommand("best", "Name the best checkpoints of a run by a metric");
  auto& wish = declare<BestRequest>(*command, action, best);
  add_run(*command, wish.run);
  command->add_option("--metric", wish.metric, "Its name; default: the run's own criterion");
  command->add_option("--mode", wish.mode, "Which is better: min or max")
      ->check(CLI::IsMember({"min", "max"}));
  command->add_option("-k,--count", wish.count, "How many, the best first")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1'000'000}));

  command = app.add_subcommand(
      "show", "Show what a checkpoint holds: tensors, dtypes, shapes, parts, hashes");
  add_checkpoint(*command, declare<std::string>(*command, action, show));

  command = app.add_subcommand("verify",
                               "Read everything and check every hash; exit code 4 on any damage");
  add_checkpoint(*command, declare<std::string>(*command, action, verify));

  struct Restored {
    std::string checkpoint;
    std::string target;
  };
  command = app.add_subcommand(
      "restore", "Copy a checkpoint out to a new directory, checking every hash on the way");
  auto& restored = declare<Restored>(*command, action, [](Tool& tool, const Restored& request) {
    return restore(tool, request.checkpoint, request.target);
  });
  add_checkpoint(*command, restored.checkpoint);
  command->add_option("DIR", restored.target, "The directory to make; it must not exist")
      ->required();
}

void declare_export(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "export",
      "Write a checkpoint for other tools: safetensors (one file of the model), hf (a directory "
      "as save_pretrained() makes it), torch (a file for torch.load()), dcp (a directory for "
      "torch.distributed.checkpoint), keras (a .keras file, or .weights.h5, of a Keras model). "
      "torch and dcp need Python with torch, keras one with keras.");
  auto& request = declare<ExportRequest>(*command, action, export_checkpoint);
  add_checkpoint(*command, request.checkpoint);
  command->add_option("DEST", request.target, "The file or directory to make")->required();
  command->add_option("--to", request.format, "safetensors, hf, torch, dcp or keras")
      ->required()
      ->check(CLI::IsMember({"safetensors", "hf", "torch", "dcp", "keras"}))
      ->type_name("FORMAT");
  command->add_flag("--force", request.replaces,
                    "Replace DEST, at once, when it is an export of the same format");
  command->add_option("--part", request.part, "safetensors, hf: which part (default: model)")
      ->type_name("NAME");
  command
      ->add_option("--max-shard-size", request.shard_size,
                   "hf: split above this many bytes of tensors (default: 5GB)")
      ->check(check_size)
      ->type_name("SIZE");
  command
      ->add_option("--only", request.only,
                   "torch, dcp, keras: leave the optimizer and the rest out")
      ->check(CLI::IsMember({"model"}))
      ->type_name("model");
}

void declare_import(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "import",
      "Make a new checkpoint of a run from files of other tools: safetensors (one file), hf (a "
      "directory as save_pretrained() makes it), torch (a file of torch.save(), read without "
      "pickle), dcp (a directory of torch.distributed.checkpoint), keras (a .keras file). torch "
      "and dcp need Python with torch, keras one with keras.");
  auto& request = declare<ImportRequest>(*command, action, import_checkpoint);
  command->add_option("SOURCE", request.source, "The file or directory to read")->required();
  add_run(*command, request.run);
  command->add_option("--from", request.format, "safetensors, hf, torch, dcp or keras")
      ->required()
      ->check(CLI::IsMember({"safetensors", "hf", "torch", "dcp", "keras"}))
      ->type_name("FORMAT");
  command->add_option("--step", request.step, "Default: the one in the files, else 0")
      ->check(CLI::NonNegativeNumber)
      ->type_name("N");
  command->add_option("--metric", request.metrics, "Such as val_loss=0.25; may be repeated")
      ->check(check_metric)
      ->type_name("NAME=VALUE")
      ->allow_extra_args(false);
  command->add_option("--part", request.part, "safetensors: the part to make (default: model)")
      ->type_name("NAME");
  command
      ->add_option("--only", request.only,
                   "torch, dcp, keras: leave the optimizer and the rest out")
      ->check(CLI::IsMember({"model"}))
      ->type_name("model");
  command->add_flag("--force-filesystem", request.takes_any_filesystem,
                    "Accept a run on a network file system");
}

struct Named {
  std::string checkpoint;
  std::string tag;
};

void declare_changers(CLI::App& app, Action& action) {
  struct Removed {
    std::string checkpoint;
    bool is_forced = false;
  };
  CLI::App* command = app.add_subcommand("rm", "Remove one checkpoint for good");
  auto& removed = declare<Removed>(*command, action, [](Tool& tool, const Removed& request) {
    return rm(tool, request.checkpoint, request.is_forced);
  });
  command
      ->add_option("CHECKPOINT", removed.checkpoint,
                   "RUN@12, a step that occurs once, a tag, or its directory")
      ->required()
      ->check(check_exact_checkpoint);
  command->add_flag("--force", removed.is_forced,
                    "Also one that a tag protects, or the last one that restores");

  const std::pair<CLI::App*, decltype(&pin)> pins[] = {
      {app.add_subcommand("pin", "Protect a checkpoint from retention"), pin},
      {app.add_subcommand("unpin", "Let retention remove a checkpoint again"), unpin}};
  for (const auto& [one, function] : pins) {
    auto& named = declare<Named>(*one, action, [function](Tool& tool, const Named& request) {
      return function(tool, request.checkpoint, request.tag);
    });
    add_checkpoint(*one, named.checkpoint);
    one->add_option("--as", named.tag, "The tag to use (default: pin-SEQUENCE)")
        ->type_name("TAG")
        ->check(check_tag);
  }

  command = app.add_subcommand(
      "tag", "Name a checkpoint; a name that exists moves. Tags protect from retention");
  auto& named = declare<Named>(*command, action, [](Tool& tool, const Named& request) {
    return tag(tool, request.checkpoint, request.tag);
  });
  add_checkpoint(*command, named.checkpoint);
  command
      ->add_option("NAME", named.tag, "Letters, digits, '.', '_' and '-'; then RUN@NAME names it")
      ->required()
      ->check(check_tag);
}

void declare_machine(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "status", "What the daemon does: clients, slots, I/O backend, saves in flight, last error");
  command->callback([&action] { action = status; });

  command = app.add_subcommand(
      "doctor", "What this machine offers: io_uring, memory, file system, daemon, lanes");
  auto& directory = declare<std::string>(*command, action, doctor);
  directory = ".";
  command->add_option("DIR", directory, "Where runs are to lie (default: here)");
}

}  // namespace

CommandLine read_command_line(int argc, char** argv) {
  CommandLine line;
  CLI::App app(
      "Checkpoints of training runs: list, check, copy out, export, import, protect, remove.");
  app.footer(kFooter);
  app.fallthrough();
  app.require_subcommand(1);
  app.set_version_flag("--version", "stillframe " STILLFRAME_VERSION);
  app.add_flag("--json", line.options.as_json, "Print one JSON document instead of text");
  app.add_option("--socket", line.options.socket_path,
                 "The daemon's socket (default: $STILLFRAME_SOCKET, the service, your own daemon)")
      ->type_name("PATH");
  declare_readers(app, line.action);
  declare_export(app, line.action);
  declare_import(app, line.action);
  declare_changers(app, line.action);
  declare_machine(app, line.action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {  // --help, --version
    line.action = nullptr;
    line.exit = app.exit(asked);
  } catch (const CLI::ParseError& wrong) {
    line.action = nullptr;
    line.exit = static_cast<int>(Exit::kUsage);
    line.complaint = concat(wrong.what(), "; see stillframe --help");
  }
  return line;
}

}  // namespace stillframe::cli
