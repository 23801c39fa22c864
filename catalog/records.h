#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "format/manifest.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// What makes parts a checkpoint: sums, the state of each rank and the manifest, each fsynced, and
// then the directory that they are in. For whoever makes one without a daemon; the parts are there
// and durable. `extent_hashes` and the manifest's parts are in the same order; the manifest gets to
// name sums and states. kInvalidArgument: the manifest says what no reader would accept.
Status write_records(uring::IoBackend& io, const std::string& directory,
                     const std::vector<std::vector<std::uint64_t>>& extent_hashes,
                     std::span<const std::string> states, format::Manifest& manifest);

}  // namespace stillframe::catalog
