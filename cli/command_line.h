#pragma once

#include <string>

#include "cli/tool.h"

namespace stillframe::cli {

// What was typed.
struct CommandLine {
  Options options;
  // Empty: there is nothing to do, for help was asked for and printed, or it cannot be read.
  Action action;
  int exit = 0;           // Then.
  std::string complaint;  // What is wrong with it; empty: nothing.
};

CommandLine read_command_line(int argc, char** argv);

}  // namespace stillframe::cli
