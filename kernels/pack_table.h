#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "kernels/pack.h"

namespace stillframe::kernels {

// PackJob::first_piece for these pieces, made once for each layout.
std::vector<std::uint32_t> first_pieces(std::span<const Piece> pieces, std::uint64_t image_bytes);

// The tables of several images, together, so that one copy brings them to a GPU.
class PackTables {
 public:
  // What add() appends.
  static std::uint64_t bytes_for(std::uint64_t piece_count, std::uint64_t image_bytes) noexcept;

  void clear() noexcept;
  // Pieces as PackJob has them. The image's number, from 0 on.
  std::size_t add(std::span<const Piece> pieces, std::uint64_t image_bytes);
  ConstBytes bytes() const noexcept { return bytes_; }
  // For some extents of an image, once bytes() lie at the GPU's address `tables`: all of the job
  // but `image` and `damaged`.
  PackJob job(std::size_t image, std::uint64_t tables, std::uint64_t first_extent,
              std::uint64_t extent_count, std::uint64_t extent_hashes) const;

 private:
  struct Image {
    std::uint64_t bytes = 0;
    std::uint64_t pieces_at = 0;  // In bytes_, as the next.
    std::uint64_t first_piece_at = 0;
  };
  std::uint64_t append(ConstBytes bytes);

  std::vector<Image> images_;
  std::vector<std::byte> bytes_;
};

}  // namespace stillframe::kernels
