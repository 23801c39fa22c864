#include "kernels/pack_table.h"

#include <cstring>

namespace stillframe::kernels {

namespace {

std::uint64_t extents_of(std::uint64_t image_bytes) {
  return (image_bytes + kExtentBytes - 1) / kExtentBytes;
}

template <class T>
T* at(std::uint64_t gpu_address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(gpu_address));
}

}  // namespace

std::vector<std::uint32_t> first_pieces(std::span<const Piece> pieces, std::uint64_t image_bytes) {
  const std::uint64_t extent_count = extents_of(image_bytes);
  std::vector<std::uint32_t> first;
  first.reserve(extent_count + 1);
  std::uint32_t next = 0;
  for (std::uint64_t extent = 0; extent <= extent_count; ++extent) {
    const std::uint64_t begin = extent * kExtentBytes;
    while (next < pieces.size() && pieces[next].image_offset + pieces[next].bytes <= begin) ++next;
    first.push_back(next);
  }
  return first;
}

std::uint64_t PackTables::bytes_for(std::uint64_t piece_count, std::uint64_t image_bytes) noexcept {
  return round_up(piece_count * sizeof(Piece), sizeof(Quad)) +
         round_up((extents_of(image_bytes) + 1) * sizeof(std::uint32_t), sizeof(Quad));
}

void PackTables::clear() noexcept {
  images_.clear();
  bytes_.clear();
}

std::uint64_t PackTables::append(ConstBytes bytes) {
  const std::uint64_t offset = bytes_.size();
  bytes_.resize(offset + round_up(bytes.size(), sizeof(Quad)));
  if (!bytes.empty()) std::memcpy(bytes_.data() + offset, bytes.data(), bytes.size());
  return offset;
}

std::size_t PackTables::add(std::span<const Piece> pieces, std::uint64_t image_bytes) {
  const auto first = first_pieces(pieces, image_bytes);
  const std::uint64_t pieces_at = append(std::as_bytes(pieces));
  const std::uint64_t first_piece_at = append(std::as_bytes(std::span(first)));
  images_.push_back(
      {.bytes = image_bytes, .pieces_at = pieces_at, .first_piece_at = first_piece_at});
  return images_.size() - 1;
}

PackJob PackTables::job(std::size_t image, std::uint64_t tables, std::uint64_t first_extent,
                        std::uint64_t extent_count, std::uint64_t extent_hashes) const {
  return {.pieces = at<const Piece>(tables + images_[image].pieces_at),
          .first_piece = at<const std::uint32_t>(tables + images_[image].first_piece_at),
          .image_bytes = images_[image].bytes,
          .first_extent = first_extent,
          .extent_count = extent_count,
          .image = nullptr,
          .extent_hashes = at<std::uint64_t>(extent_hashes),
          .damaged = nullptr};
}

}  // namespace stillframe::kernels
