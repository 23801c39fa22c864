#pragma once

#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "format/safetensors.h"
#include "shm/arena.h"

namespace stillframe::daemon {

// The daemon's own copy of a rank's layout, with every byte placed. What the client later claims is
// checked against it.
struct SnapshotPlan {
  std::uint64_t layout_id = 0;  // XXH3-64 of the layout as the client sent it.
  std::vector<format::PartImage> parts;
  std::vector<std::uint64_t> part_offsets;  // In the slot.
  std::vector<std::uint32_t> extent_counts;
  std::uint64_t slot_bytes = 0;
  std::uint64_t extent_count = 0;  // Of all parts.
  std::uint64_t bytes = 0;         // Of all parts' files.

  // One part's bytes in a slot, up to the end of its last block.
  Bytes image(Bytes slot, std::size_t part) const {
    return slot.subspan(part_offsets[part], round_up(parts[part].bytes, kBlockBytes));
  }
};

// From the blob of RegisterLayout, already private. kInvalidArgument with the tensor or part at
// fault.
Result<SnapshotPlan> plan_snapshot(ConstBytes layout_blob);

}  // namespace stillframe::daemon
