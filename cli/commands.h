#pragma once

// One file per command: each declares its words and flags to CLI11 and, when it is the one that was
// called, leaves in `action` what is to be done.

#include <CLI/CLI.hpp>

#include "cli/tool.h"

namespace stillframe::cli {

void declare_best(CLI::App& app, Action& action);
void declare_ls(CLI::App& app, Action& action);
void declare_show(CLI::App& app, Action& action);
void declare_verify(CLI::App& app, Action& action);
void declare_restore(CLI::App& app, Action& action);
void declare_export(CLI::App& app, Action& action);
void declare_import(CLI::App& app, Action& action);
void declare_rm(CLI::App& app, Action& action);
void declare_pin(CLI::App& app, Action& action);  // pin and unpin
void declare_tag(CLI::App& app, Action& action);
void declare_status(CLI::App& app, Action& action);
void declare_doctor(CLI::App& app, Action& action);

}  // namespace stillframe::cli
