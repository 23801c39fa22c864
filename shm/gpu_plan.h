#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"

namespace stillframe::shm {

// What a client has a GPU's worker pack: the contents of the memfd of PlanGpu. Fixed records, as
// there may be 10^6 of them:
//
//   4 x u64   how many parts, chunks, allocations, pieces
//   then the records of each kind, as below, little-endian, without gaps
struct GpuPlan {
  struct Part {
    std::uint64_t image_bytes = 0;
    std::uint64_t slot_offset = 0;  // Of its image.
    std::uint64_t piece_count = 0;  // Of `pieces`, behind those of the parts before.
  };
  // Consecutive extents of a part, packed by one launch.
  struct Chunk {
    std::uint32_t part = 0;
    std::uint32_t first_extent = 0;
    std::uint32_t extent_count = 0;
    std::uint32_t reserved = 0;
  };
  struct Piece {
    std::uint32_t allocation = 0;
    std::uint32_t reserved = 0;
    std::uint64_t offset = 0;  // In its allocation.
    std::uint64_t image_offset = 0;
    std::uint64_t bytes = 0;
  };

  std::vector<Part> parts;
  std::vector<Chunk> chunks;
  std::vector<std::uint64_t> allocation_bytes;  // The first is the client's own; 0: there is none.
  std::vector<Piece> pieces;                    // Of all parts.
};

// Of a chunk's image, in whole leaves.
std::uint64_t chunk_bytes(const GpuPlan& plan, const GpuPlan::Chunk& chunk);

inline constexpr std::uint64_t kGpuPlanBytesMax = std::uint64_t{256} << 20;

std::string encode(const GpuPlan& plan);
// `blob` is private memory. kInvalidArgument unless everything in it fits: each piece lies within
// its allocation, those of a part are sorted and do not overlap, those of a chunk leave no gap, and
// the images lie within `slot_bytes`.
Result<GpuPlan> decode_gpu_plan(ConstBytes blob, std::uint64_t slot_bytes);

}  // namespace stillframe::shm
