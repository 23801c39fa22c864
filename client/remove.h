#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace stillframe::client {

// Whether a trainer may have this checkpoint removed: ok, or why not. kNotFound: it is not there.
// kInvalidArgument: a tag protects it, or no newer intact one is there to restore (P4).
Status may_remove(const std::string& run_path, std::uint64_t sequence);

}  // namespace stillframe::client
