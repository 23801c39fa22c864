#include "shm/gpu_plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

namespace {

// Of an image that is small enough: for each byte, how many pieces bring it.
std::vector<int> count_pieces(const shm::GpuPlan& plan, std::size_t part) {
  std::vector<int> counts(plan.parts[part].image_bytes);
  std::size_t first = 0;
  for (std::size_t i = 0; i < part; ++i) first += plan.parts[i].piece_count;
  for (std::size_t i = first; i < first + plan.parts[part].piece_count; ++i) {
    const shm::GpuPlan::Piece& piece = plan.pieces[i];
    for (std::uint64_t at = 0; at < piece.bytes; ++at) ++counts.at(piece.image_offset + at);
  }
  return counts;
}

}  // namespace

bool gpu_plan(ConstBytes input) {
  constexpr std::uint64_t kSmallBytes = std::uint64_t{64} << 10U;
  if (input.size() < 8) return false;
  const std::uint64_t slot_bytes = load_u64(input.data());
  const auto plan = shm::decode_gpu_plan(input.subspan(8), slot_bytes);
  if (!plan) {
    check(plan.error().code() == Code::kInvalidArgument, "a peer's fault");
    return false;
  }
  const std::string again = shm::encode(*plan);
  check(again.size() == input.size() - 8 &&
            std::memcmp(again.data(), input.data() + 8, again.size()) == 0,
        "nothing is left out");
  for (const shm::GpuPlan::Piece& piece : plan->pieces) {
    const std::uint64_t bytes = plan->allocation_bytes.at(piece.allocation);
    check(piece.offset < bytes && piece.bytes <= bytes - piece.offset, "within its allocation");
  }
  for (const shm::GpuPlan::Chunk& chunk : plan->chunks) {
    const shm::GpuPlan::Part& part = plan->parts.at(chunk.part);
    const std::uint64_t begin = std::uint64_t{chunk.first_extent} * kExtentBytes;
    const std::uint64_t bytes = shm::chunk_bytes(*plan, chunk);
    check(bytes > 0 && bytes <= slot_bytes, "a chunk fits a slot");
    check(part.slot_offset <= slot_bytes && begin + bytes <= slot_bytes - part.slot_offset,
          "a chunk lies within its slot");
    if (part.image_bytes > kSmallBytes) continue;
    const std::vector<int> counts = count_pieces(*plan, chunk.part);
    const std::uint64_t end = std::min(begin + bytes, part.image_bytes);
    for (std::uint64_t at = begin; at < end; ++at) check(counts[at] == 1, "brought once");
  }
  return true;
}

}  // namespace stillframe::fuzz
