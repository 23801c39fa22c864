#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "client/gpu_tensors.h"
#include "client/layout.h"

namespace stillframe::client {

// Who brings which bytes of an image into the slot, when tensors lie on GPUs. An extent that holds
// bytes of a GPU's tensor is packed whole by that GPU, which hashes it; the others are the host's.
// What such an extent holds besides, the header, tensors of the host or of another GPU, comes by
// page-locked memory, the staging. Tensors that the kernels do not take, for they are not
// contiguous, are fetched there whole and are then the host's.
//
// Made once for each layout and place of the tensors, so that a save itself only fills bytes in.
struct GpuPlan {
  // Consecutive extents of a part, one launch.
  struct Chunk {
    std::uint32_t part = 0;
    std::uint32_t first_extent = 0;
    std::uint32_t extent_count = 0;
    std::uint64_t first_hash = 0;  // Index among the hashes of the share.
  };

  enum class Origin : std::uint8_t {
    kTensor,   // `where` is an address of the GPU.
    kStaging,  // An offset in the staging.
    kEarly,    // An offset among the share's early copies.
  };
  struct Piece {
    Origin origin = Origin::kTensor;
    std::uint64_t where = 0;
    std::uint64_t image_offset = 0;
    std::uint64_t bytes = 0;
  };
  // Of one part, sorted by image_offset.
  struct PartPieces {
    std::uint32_t part = 0;
    std::vector<Piece> pieces;
  };
  // A tensor whose memory may change when save() has returned: copied in the trainer's stream.
  struct EarlyCopy {
    std::uint64_t data = 0;
    std::uint64_t bytes = 0;
    std::uint64_t early_offset = 0;
  };
  // What one GPU does.
  struct Share {
    int ordinal = 0;
    std::vector<PartPieces> parts;
    std::vector<Chunk> chunks;
    std::uint64_t extent_count = 0;
    std::vector<EarlyCopy> early;
    std::uint64_t early_bytes = 0;
  };

  // GPU memory that is copied to the staging before save() returns.
  struct Fetch {
    int ordinal = 0;
    std::uint64_t data = 0;
    std::uint64_t bytes = 0;
    std::uint64_t staging_offset = 0;
  };
  // A tensor that was fetched whole: where its first element lies in the staging.
  struct Fetched {
    std::uint32_t tensor = 0;  // In the order of the layout.
    std::uint64_t staging_offset = 0;
  };
  // Bytes of a source of the host that are copied to the staging before save() returns.
  struct HostRun {
    std::uint32_t part = 0;
    std::uint32_t source = 0;
    std::uint64_t offset = 0;  // In the source.
    std::uint64_t bytes = 0;
    std::uint64_t staging_offset = 0;
  };

  std::vector<Share> shares;  // By ordinal.
  std::vector<Fetch> fetches;
  std::vector<Fetched> fetched;
  std::vector<HostRun> host_runs;
  std::uint64_t staging_bytes = 0;
  // By part and extent: whether a GPU packs it.
  std::vector<std::vector<bool>> is_packed;
};

// `max_chunk_extents`: of one launch, at least 1.
GpuPlan make_gpu_plan(const Layout& layout, std::span<const GpuTensor> tensors,
                      std::uint32_t max_chunk_extents);

}  // namespace stillframe::client
