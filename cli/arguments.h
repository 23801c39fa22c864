#pragma once

// The arguments that several commands take. What is wrong with one is found while the command line
// is read, so that it is a usage error.

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

namespace stillframe::cli {

using Argument = std::shared_ptr<std::string>;

// RUN: a directory, without a selector.
Argument add_run(CLI::App& command);
// CHECKPOINT: RUN@SELECTOR, a checkpoint's directory, or RUN alone for its latest.
Argument add_checkpoint(CLI::App& command);
// The same, but RUN alone is too little: for what cannot be undone.
Argument add_exact_checkpoint(CLI::App& command);

// For CLI::Option::check(): what is wrong with a tag, or empty.
std::string check_tag_argument(const std::string& tag);

}  // namespace stillframe::cli
