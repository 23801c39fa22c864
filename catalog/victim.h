#pragma once

// C12 and C13: what retire() and recover() share.

#include <cstdint>
#include <string>

#include "base/result.h"
#include "catalog/change.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// How the entries of a checkpoint's directory look to C12 and C13.
struct VictimFiles {
  bool has_manifest = false;
  bool has_dead_manifest = false;
  bool is_empty = true;
};
Result<VictimFiles> look_at_victim(uring::IoBackend& io, const std::string& victim_path);

// Syncs the victim's directory, so that its manifest stays dead, then takes the rest away; the
// manifest must be dead or missing by now. Parts go to the spool as far as `limits` lets them;
// nullptr: never. Files that are not the checkpoint's stay, with the directory and the dead
// manifest around them.
Status finish_victim(uring::IoBackend& io, const std::string& run_path,
                     const std::string& victim_path, const SpoolLimits* limits);

// If no other checkpoint's directory is newer, makes sure that the victim's sequence is never given
// again.
Status keep_sequence_used(uring::IoBackend& io, const std::string& run_path,
                          std::uint64_t sequence);

}  // namespace stillframe::catalog
