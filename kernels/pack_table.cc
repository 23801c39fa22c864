#include "kernels/pack_table.h"

namespace stillframe::kernels {

std::vector<std::uint32_t> first_pieces(std::span<const Piece> pieces, std::uint64_t image_bytes) {
  const std::uint64_t extent_count = (image_bytes + kExtentBytes - 1) / kExtentBytes;
  std::vector<std::uint32_t> first;
  first.reserve(extent_count + 1);
  std::uint32_t at = 0;
  for (std::uint64_t extent = 0; extent <= extent_count; ++extent) {
    const std::uint64_t begin = extent * kExtentBytes;
    while (at < pieces.size() && pieces[at].image_offset + pieces[at].bytes <= begin) ++at;
    first.push_back(at);
  }
  return first;
}

}  // namespace stillframe::kernels
