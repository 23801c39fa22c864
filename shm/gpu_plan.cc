#include "shm/gpu_plan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#include "base/text.h"

namespace stillframe::shm {

static_assert(std::endian::native == std::endian::little);
static_assert(sizeof(GpuPlan::Part) == 24 && sizeof(GpuPlan::Chunk) == 16 &&
              sizeof(GpuPlan::Piece) == 32);

namespace {

Error malformed(std::string_view what) {
  return Error(Code::kInvalidArgument, concat("plan for a GPU worker: ", what));
}

template <class Record>
void append(std::string& blob, const std::vector<Record>& records) {
  static_assert(std::is_trivially_copyable_v<Record>);
  blob.append(reinterpret_cast<const char*>(records.data()), records.size() * sizeof(Record));
}

// Takes the records of one kind from the front.
template <class Record>
bool take(ConstBytes& rest, std::uint64_t count, std::vector<Record>& records) {
  if (count > rest.size() / sizeof(Record)) return false;
  records.resize(count);
  if (count > 0) std::memcpy(records.data(), rest.data(), count * sizeof(Record));
  rest = rest.subspan(count * sizeof(Record));
  return true;
}

bool lies_within(std::uint64_t offset, std::uint64_t bytes, std::uint64_t all) {
  return offset <= all && bytes <= all - offset;
}

Status check_part(const GpuPlan& plan, const GpuPlan::Part& part, std::uint64_t first_piece,
                  std::uint64_t slot_bytes) {
  if (part.image_bytes == 0 || part.image_bytes > slot_bytes ||
      !lies_within(part.slot_offset, round_up(part.image_bytes, kLeafBytes), slot_bytes)) {
    return malformed("an image outside of its slot");
  }
  std::uint64_t end = 0;
  for (std::uint64_t i = first_piece; i < first_piece + part.piece_count; ++i) {
    const GpuPlan::Piece& piece = plan.pieces[i];
    if (piece.bytes == 0 || piece.image_offset < end ||
        !lies_within(piece.image_offset, piece.bytes, part.image_bytes)) {
      return malformed("pieces that overlap, or lie outside of their image");
    }
    if (piece.allocation >= plan.allocation_bytes.size() ||
        !lies_within(piece.offset, piece.bytes, plan.allocation_bytes[piece.allocation])) {
      return malformed("a piece outside of its allocation");
    }
    end = piece.image_offset + piece.bytes;
  }
  return ok();
}

// The kernel takes what follows the end of a piece from the next one.
bool is_covered(const GpuPlan& plan, std::uint64_t first_piece, std::uint64_t piece_count,
                std::uint64_t begin, std::uint64_t end) {
  const auto first = plan.pieces.begin() + static_cast<std::ptrdiff_t>(first_piece);
  const auto last = first + static_cast<std::ptrdiff_t>(piece_count);
  auto piece = std::upper_bound(first, last, begin, [](std::uint64_t at, const auto& one) {
    return at < one.image_offset + one.bytes;
  });
  for (std::uint64_t at = begin; at < end; ++piece) {
    if (piece == last || piece->image_offset > at) return false;
    at = piece->image_offset + piece->bytes;
  }
  return true;
}

Status check_chunk(const GpuPlan& plan, const std::vector<std::uint64_t>& first_pieces,
                   const GpuPlan::Chunk& chunk) {
  if (chunk.part >= plan.parts.size() || chunk.extent_count == 0) {
    return malformed("a chunk of no part, or of no extents");
  }
  const GpuPlan::Part& part = plan.parts[chunk.part];
  const std::uint64_t extent_count = (part.image_bytes + kExtentBytes - 1) / kExtentBytes;
  if (!lies_within(chunk.first_extent, chunk.extent_count, extent_count)) {
    return malformed("a chunk outside of its image");
  }
  const std::uint64_t begin = std::uint64_t{chunk.first_extent} * kExtentBytes;
  const std::uint64_t end = begin + std::uint64_t{chunk.extent_count} * kExtentBytes;
  if (!is_covered(plan, first_pieces[chunk.part], part.piece_count, begin,
                  std::min(end, part.image_bytes))) {
    return malformed("a chunk with a gap between its pieces");
  }
  return ok();
}

}  // namespace

std::uint64_t chunk_bytes(const GpuPlan& plan, const GpuPlan::Chunk& chunk) {
  const std::uint64_t begin = std::uint64_t{chunk.first_extent} * kExtentBytes;
  const std::uint64_t end = begin + std::uint64_t{chunk.extent_count} * kExtentBytes;
  return std::min(end, round_up(plan.parts[chunk.part].image_bytes, kLeafBytes)) - begin;
}

std::string encode(const GpuPlan& plan) {
  const std::array<std::uint64_t, 4> counts = {plan.parts.size(), plan.chunks.size(),
                                               plan.allocation_bytes.size(), plan.pieces.size()};
  std::string blob(reinterpret_cast<const char*>(counts.data()), sizeof counts);
  append(blob, plan.parts);
  append(blob, plan.chunks);
  append(blob, plan.allocation_bytes);
  append(blob, plan.pieces);
  return blob;
}

Result<GpuPlan> decode_gpu_plan(ConstBytes blob, std::uint64_t slot_bytes) {
  std::array<std::uint64_t, 4> counts{};
  if (blob.size() < sizeof counts) return malformed("too short");
  std::memcpy(counts.data(), blob.data(), sizeof counts);
  ConstBytes rest = blob.subspan(sizeof counts);
  GpuPlan plan;
  if (!take(rest, counts[0], plan.parts) || !take(rest, counts[1], plan.chunks) ||
      !take(rest, counts[2], plan.allocation_bytes) || !take(rest, counts[3], plan.pieces) ||
      !rest.empty()) {
    return malformed("not as long as its counts say");
  }
  if (plan.allocation_bytes.empty() || plan.chunks.empty()) return malformed("empty");
  std::vector<std::uint64_t> first_pieces;
  std::uint64_t next = 0;
  for (const GpuPlan::Part& part : plan.parts) {
    if (part.piece_count > plan.pieces.size() - next) return malformed("a part with more pieces");
    auto checked = check_part(plan, part, next, slot_bytes);
    if (!checked) return std::move(checked).error();
    first_pieces.push_back(next);
    next += part.piece_count;
  }
  if (next != plan.pieces.size()) return malformed("pieces of no part");
  for (const GpuPlan::Chunk& chunk : plan.chunks) {
    auto checked = check_chunk(plan, first_pieces, chunk);
    if (!checked) return std::move(checked).error();
  }
  return plan;
}

}  // namespace stillframe::shm
