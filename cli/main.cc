// stillframe: lists, checks, copies out, exports, imports and protects checkpoints. Needs no daemon
// but for `status`.
//
// Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 damage found. An error is one line on
// standard error that ends with the next step to take.

#include <csignal>
#include <cstdio>
#include <string>
#include <utility>

#include "cli/command_line.h"
#include "cli/text.h"
#include "cli/tool.h"

namespace stillframe::cli {
namespace {

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

  CommandLine line = read_command_line(argc, argv);
  if (!line.complaint.empty()) complain(line.complaint);
  if (!line.action) return line.exit;

  Tool tool(std::move(line.options));
  auto result = line.action(tool);
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
