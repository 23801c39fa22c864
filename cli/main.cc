// stillframe: lists, checks, copies out, exports, imports and protects checkpoints. Needs no daemon
// but for `status`.
//
// Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 damage found. An error is one line on
// standard error that ends with the next step to take.

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <string>

#include "cli/commands.h"
#include "cli/text.h"
#include "cli/tool.h"

namespace stillframe::cli {
namespace {

constexpr const char* kFooter =
    "CHECKPOINT is RUN@latest, RUN@best, RUN@12 (a sequence), RUN@step-1200, RUN@TAG or a\n"
    "checkpoint's own directory; RUN alone is its latest. RUN is the directory of one training\n"
    "history.\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 damage found.";

Exit exit_for(Code code) {
  switch (code) {
    case Code::kNotFound: return Exit::kNotFound;
    case Code::kDataLoss: return Exit::kDamaged;
    case Code::kInvalidArgument:
    case Code::kResourceExhausted:
    case Code::kUnavailable:
    case Code::kCancelled:
    case Code::kInternal: return Exit::kFailed;
  }
  return Exit::kFailed;
}

int ended(Exit exit) { return static_cast<int>(exit); }

void complain(std::string_view text) {
  std::fprintf(stderr, "stillframe: %s\n", one_line(text).c_str());
}

int run(int argc, char** argv) {
  // A reader that goes away (`stillframe ls | head`) is a failed write, not a signal.
  (void)std::signal(SIGPIPE, SIG_IGN);

  CLI::App app(
      "Checkpoints of training runs: list, check, copy out, export, import, protect, remove.");
  Options options;
  Action action;
  app.footer(kFooter);
  app.fallthrough();
  app.require_subcommand(1);
  app.set_version_flag("--version", "stillframe " STILLFRAME_VERSION);
  app.add_flag("--json", options.as_json, "Print one JSON document instead of text");
  app.add_option("--socket", options.socket_path,
                 "The daemon's socket (default: $STILLFRAME_SOCKET, the service, your own daemon)")
      ->type_name("PATH");
  declare_ls(app, action);
  declare_best(app, action);
  declare_show(app, action);
  declare_verify(app, action);
  declare_restore(app, action);
  declare_export(app, action);
  declare_import(app, action);
  declare_rm(app, action);
  declare_pin(app, action);
  declare_tag(app, action);
  declare_status(app, action);
  declare_doctor(app, action);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {  // --help, --version
    return app.exit(asked);
  } catch (const CLI::ParseError& wrong) {
    complain(std::string(wrong.what()) + "; see stillframe --help");
    return ended(Exit::kUsage);
  }

  Tool tool(std::move(options));
  auto result = action(tool);
  if (auto flushed = tool.flush(); !flushed) {
    complain(flushed.error().message());
    return ended(Exit::kFailed);
  }
  if (result) return ended(*result);
  complain(result.error().message());
  return ended(exit_for(result.error().code()));
}

}  // namespace
}  // namespace stillframe::cli

int main(int argc, char** argv) { return stillframe::cli::run(argc, argv); }
