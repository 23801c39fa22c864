#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"
#include "kernels/block.h"
#include "kernels/leaf_hash.h"

// Tensors scattered over a GPU's memory into the image of a part and back, in one launch each,
// whatever their number, sizes and alignment; the image's extents are hashed in the same pass.
namespace stillframe::kernels {

// A tensor, or the header, as the run of bytes [image_offset, image_offset + bytes) of the image.
// Contiguous; `data` is memory of the GPU.
struct Piece {
  std::byte* data = nullptr;
  std::uint64_t image_offset = 0;
  std::uint64_t bytes = 0;
};

// The one argument of both kernels. All pointers are to memory of the GPU that lives until the
// launch has ended; nothing else writes there meanwhile.
struct PackJob {
  // Sorted by image_offset, none empty. For pack() they cover [0, image_bytes) without gaps; for
  // unpack() they may leave any out.
  const Piece* pieces = nullptr;
  // For each extent of the image, and for one behind it, the index of the first piece that ends
  // behind the extent's first byte; piece_count where there is none.
  const std::uint32_t* first_piece = nullptr;
  std::uint64_t image_bytes = 0;
  // Which extents are done; `image` is the place of the first one, on a multiple of 16, and holds
  // whole leaves: pack() fills the last leaf of the image up with zeros.
  std::uint64_t first_extent = 0;
  std::uint64_t extent_count = 0;
  std::byte* image = nullptr;
  // Of the extents done, as base/hash.h. pack() writes them; unpack() compares, and sets
  // damaged[i] to 1 where the image's extent has another one. Its pieces have been written then.
  std::uint64_t* extent_hashes = nullptr;
  std::uint32_t* damaged = nullptr;
};

// A round handles a leaf for each warp.
inline constexpr std::uint32_t kWarps = kBlockThreads / kWarpThreads;  // 8
inline constexpr std::uint32_t kRoundBytes = kWarps * static_cast<std::uint32_t>(kLeafBytes);
inline constexpr std::uint32_t kLeafQuads = static_cast<std::uint32_t>(kLeafBytes) / 16;  // 256
inline constexpr std::uint32_t kRounds =
    static_cast<std::uint32_t>(kLeavesPerExtent) / kWarps;  // 32
// Shared memory: the leaves of a round, then the leaf hashes of the extent.
inline constexpr std::uint32_t kLeafHashesAt = kRoundBytes;
inline constexpr std::uint32_t kSharedBytes =
    kRoundBytes + static_cast<std::uint32_t>(kLeavesPerExtent) * 8;

// The first piece of [first, end) that ends behind `offset`; `end` when there is none.
template <class Block>
STILLFRAME_DEVICE std::uint32_t find_piece(Block& block, const Piece* pieces, std::uint32_t first,
                                           std::uint32_t end, std::uint64_t offset) {
  while (first < end) {
    const std::uint32_t middle = first + (end - first) / 2;
    const Piece& piece = pieces[middle];
    const std::uint64_t piece_end = block.load(&piece.image_offset) + block.load(&piece.bytes);
    if (piece_end <= offset) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  return first;
}

// The widest of 8, 4, 2 and 1 bytes to which both are aligned and that does not pass `bytes`.
STILLFRAME_DEVICE std::uint32_t step_bytes(std::uint64_t address, std::uint32_t at,
                                           std::uint64_t bytes) {
  for (std::uint32_t step = 8; step > 1; step /= 2) {
    if (address % step == 0 && at % step == 0 && bytes >= step) return step;
  }
  return 1;
}

template <class Block>
STILLFRAME_DEVICE std::uint64_t load_some(Block& block, const std::byte* data, std::uint32_t step) {
  switch (step) {
    case 8: return block.load(reinterpret_cast<const std::uint64_t*>(data));
    case 4: return block.load(reinterpret_cast<const std::uint32_t*>(data));
    case 2: return block.load(reinterpret_cast<const std::uint16_t*>(data));
    default: return block.load(reinterpret_cast<const std::uint8_t*>(data));
  }
}

template <class Block>
STILLFRAME_DEVICE void store_some(Block& block, std::byte* data, std::uint32_t step,
                                  std::uint64_t value) {
  switch (step) {
    case 8: block.store(reinterpret_cast<std::uint64_t*>(data), value); return;
    case 4:
      block.store(reinterpret_cast<std::uint32_t*>(data), static_cast<std::uint32_t>(value));
      return;
    case 2:
      block.store(reinterpret_cast<std::uint16_t*>(data), static_cast<std::uint16_t>(value));
      return;
    default: block.store(reinterpret_cast<std::uint8_t*>(data), static_cast<std::uint8_t>(value));
  }
}

// Calls move(data, at, step) for the bytes of the pieces from `at_piece` on that lie in the 16 of
// the image from `offset` on: `step` of them, `at` behind `offset`.
template <class Block, class Move>
STILLFRAME_DEVICE void for_each_run(Block& block, const Piece* pieces, std::uint32_t at_piece,
                                    std::uint32_t end_piece, std::uint64_t offset, Move&& move) {
  for (; at_piece < end_piece; ++at_piece) {
    std::byte* const data = block.load(&pieces[at_piece].data);
    const std::uint64_t begin = block.load(&pieces[at_piece].image_offset);
    const std::uint64_t end = begin + block.load(&pieces[at_piece].bytes);
    if (begin >= offset + 16) return;
    std::uint64_t from = begin > offset ? begin : offset;
    const std::uint64_t to = end < offset + 16 ? end : offset + 16;
    while (from < to) {
      std::byte* const address = data + (from - begin);
      const auto at = static_cast<std::uint32_t>(from - offset);
      const std::uint32_t step =
          step_bytes(reinterpret_cast<std::uintptr_t>(address), at, to - from);
      move(address, at, step);
      from += step;
    }
  }
}

// Where a thread's share of a leaf comes from or goes to.
struct LeafPlace {
  std::uint32_t piece = 0;
  std::uint32_t end_piece = 0;
  // Not null: the whole leaf lies in one piece, there, on a multiple of 16.
  std::byte* whole = nullptr;
};

template <class Block>
STILLFRAME_DEVICE LeafPlace find_leaf(Block& block, const PackJob& job, std::uint64_t extent,
                                      std::uint64_t offset) {
  LeafPlace place;
  // One piece may begin in this extent and end in the next.
  const std::uint32_t behind = block.load(&job.first_piece[extent + 1]);
  const std::uint32_t piece_count =
      block.load(&job.first_piece[(job.image_bytes + kExtentBytes - 1) / kExtentBytes]);
  place.end_piece = behind < piece_count ? behind + 1 : piece_count;
  place.piece =
      find_piece(block, job.pieces, block.load(&job.first_piece[extent]), place.end_piece, offset);
  if (place.piece == place.end_piece) return place;
  const Piece& piece = job.pieces[place.piece];
  const std::uint64_t begin = block.load(&piece.image_offset);
  if (begin > offset || begin + block.load(&piece.bytes) < offset + kLeafBytes) return place;
  std::byte* const address = block.load(&piece.data) + (offset - begin);
  if (reinterpret_cast<std::uintptr_t>(address) % 16 == 0) place.whole = address;
  return place;
}

// The 16 bytes of the image from `offset` on, zeros behind its end.
template <class Block>
STILLFRAME_DEVICE Quad gather_quad(Block& block, const PackJob& job, const LeafPlace& place,
                                   std::uint64_t offset) {
  Quad quad;
  const std::uint32_t piece = find_piece(block, job.pieces, place.piece, place.end_piece, offset);
  for_each_run(block, job.pieces, piece, place.end_piece, offset,
               [&](const std::byte* data, std::uint32_t at, std::uint32_t step) {
                 const std::uint64_t value = load_some(block, data, step) << at % 8 * 8;
                 (at < 8 ? quad.low : quad.high) |= value;
               });
  return quad;
}

// The reverse, as far as there are pieces.
template <class Block>
STILLFRAME_DEVICE void scatter_quad(Block& block, const PackJob& job, const LeafPlace& place,
                                    std::uint64_t offset, const Quad& quad) {
  const std::uint32_t piece = find_piece(block, job.pieces, place.piece, place.end_piece, offset);
  for_each_run(block, job.pieces, piece, place.end_piece, offset,
               [&](std::byte* data, std::uint32_t at, std::uint32_t step) {
                 store_some(block, data, step, (at < 8 ? quad.low : quad.high) >> at % 8 * 8);
               });
}

// Moves one leaf: from its pieces to shared memory and the image, or from the image to shared
// memory and its pieces. A thread has every 32nd Quad of its warp's leaf.
template <bool kPacks, class Block>
STILLFRAME_DEVICE void move_leaf(Block& block, const PackJob& job, std::uint64_t extent,
                                 std::uint32_t leaf, std::uint32_t thread) {
  const std::uint64_t leaf_offset = extent * kExtentBytes + leaf * kLeafBytes;
  if (leaf_offset >= job.image_bytes) return;
  const LeafPlace place = find_leaf(block, job, extent, leaf_offset);
  std::byte* const image =
      job.image + (extent - job.first_extent) * kExtentBytes + leaf * kLeafBytes;
  const std::uint32_t shared_leaf = thread / kWarpThreads * static_cast<std::uint32_t>(kLeafBytes);
  for (std::uint32_t i = 0; i < kLeafQuads / kWarpThreads; ++i) {
    const std::uint32_t at = (i * kWarpThreads + thread % kWarpThreads) * 16;
    Quad* const stored = reinterpret_cast<Quad*>(image + at);
    Quad quad;
    if (kPacks) {
      quad = place.whole != nullptr ? block.load(reinterpret_cast<const Quad*>(place.whole + at))
                                    : gather_quad(block, job, place, leaf_offset + at);
      block.store(stored, quad);
    } else {
      quad = block.load(stored);
      if (place.whole != nullptr) {
        block.store(reinterpret_cast<Quad*>(place.whole + at), quad);
      } else {
        scatter_quad(block, job, place, leaf_offset + at, quad);
      }
      // Bytes behind the end of the image count as zeros, whatever they are.
      const std::uint64_t end = leaf_offset + at;
      const std::uint64_t rest = end < job.image_bytes ? job.image_bytes - end : 0;
      if (rest < 8) quad.low &= rest == 0 ? 0 : ~std::uint64_t{0} >> (64 - rest * 8);
      if (rest < 16) quad.high &= rest <= 8 ? 0 : ~std::uint64_t{0} >> (128 - rest * 8);
    }
    block.shared().store(thread, shared_leaf + at, quad);
  }
}

// Moves an extent and gives thread 0 its hash.
template <bool kPacks, class Block>
STILLFRAME_DEVICE void move_extent(Block& block, const PackJob& job, std::uint64_t extent,
                                   typename Block::template PerThread<std::uint64_t>& hash) {
  const std::uint64_t begin = extent * kExtentBytes;
  const std::uint64_t bytes =
      job.image_bytes - begin < kExtentBytes ? job.image_bytes - begin : kExtentBytes;
  const auto leaf_count = static_cast<std::uint32_t>((bytes + kLeafBytes - 1) / kLeafBytes);
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    const std::uint32_t first_leaf = round * kWarps;
    if (first_leaf < leaf_count) {
      block.each([&](std::uint32_t thread) {
        move_leaf<kPacks>(block, job, extent, first_leaf + thread / kWarpThreads, thread);
      });
      block.barrier();
      const std::uint32_t warps =
          leaf_count - first_leaf < kWarps ? leaf_count - first_leaf : kWarps;
      hash_by_warps(block, 0, kLeafBytes, kLeafBytes, warps, hash);
    }
    block.each([&](std::uint32_t thread) {
      if (thread % kWarpThreads != 0) return;
      const std::uint32_t leaf = first_leaf + thread / kWarpThreads;
      // Leaves that a short last extent lacks count as 0.
      const std::uint64_t leaf_hash = leaf < leaf_count ? hash[thread] : 0;
      block.shared().store(thread, kLeafHashesAt + leaf * 8, leaf_hash);
    });
    block.barrier();
  }
  hash_by_warps(block, kLeafHashesAt, 0, kLeavesPerExtent * 8, 1, hash);
}

template <class Block>
STILLFRAME_DEVICE void pack(Block& block, const PackJob& job) {
  for (std::uint64_t i = block.index(); i < job.extent_count; i += block.count()) {
    typename Block::template PerThread<std::uint64_t> hash;
    move_extent<true>(block, job, job.first_extent + i, hash);
    block.each([&](std::uint32_t thread) {
      if (thread == 0) block.store(&job.extent_hashes[i], hash[thread]);
    });
    block.barrier();
  }
}

template <class Block>
STILLFRAME_DEVICE void unpack(Block& block, const PackJob& job) {
  for (std::uint64_t i = block.index(); i < job.extent_count; i += block.count()) {
    typename Block::template PerThread<std::uint64_t> hash;
    move_extent<false>(block, job, job.first_extent + i, hash);
    block.each([&](std::uint32_t thread) {
      if (thread != 0) return;
      const bool is_damaged = block.load(&job.extent_hashes[i]) != hash[thread];
      block.store(&job.damaged[i], std::uint32_t{is_damaged ? 1U : 0U});
    });
    block.barrier();
  }
}

}  // namespace stillframe::kernels
