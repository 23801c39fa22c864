#pragma once

// The formats that only their own library reads and writes (torch, dcp) are converted by
// `stillframe.convert`, a Python module that this command starts.

#include <string>
#include <vector>

#include "base/result.h"

namespace stillframe::cli {

struct ConverterAnswer {
  // Not 0: it has said on standard error what is wrong, and this is the command's exit code.
  int exit_code = 0;
  std::string out;  // What it wrote to standard output: one JSON document.
};

// Runs it and waits for its end. The interpreter is $STILLFRAME_PYTHON (the `stillframe` of a wheel
// sets it to its own), else python3 of $PATH. `scratch_fd`, unless -1, is file descriptor 3 over
// there. kNotFound: there is no interpreter.
Result<ConverterAnswer> run_converter(const std::vector<std::string>& arguments, int scratch_fd);

}  // namespace stillframe::cli
