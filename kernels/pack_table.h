#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/pack.h"

namespace stillframe::kernels {

// PackJob::first_piece for these pieces, made once for each layout.
std::vector<std::uint32_t> first_pieces(std::span<const Piece> pieces, std::uint64_t image_bytes);

}  // namespace stillframe::kernels
