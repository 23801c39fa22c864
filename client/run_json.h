#pragma once

#include <string>

#include "base/result.h"

namespace stillframe::client {

// The checkpoints of a run as a JSON array, oldest first, damaged ones with their reason; the
// members are listed at sf_run_list().
Result<std::string> list_run(const std::string& run_path);

}  // namespace stillframe::client
