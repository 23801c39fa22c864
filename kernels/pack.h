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
inline constexpr std::uint32_t kWarps = kBlockThreads / kWarpThreads;                     // 16
inline constexpr std::uint32_t kLeafQuads = static_cast<std::uint32_t>(kLeafBytes) / 16;  // 256
inline constexpr std::uint32_t kRounds =
    static_cast<std::uint32_t>(kLeavesPerExtent) / kWarps;  // 16
// Shared memory: the leaf hashes of an extent and of the one before, which one warp may still read.
inline constexpr std::uint32_t kLeafHashBytes = static_cast<std::uint32_t>(kLeavesPerExtent) * 8;
inline constexpr std::uint32_t kSharedBytes = 2 * kLeafHashBytes;

inline constexpr std::uint32_t kLeafBlocks =
    static_cast<std::uint32_t>(kLeafBytes) / kHashBlockBytes;  // 4
using Leaf = HashInput<kLeafBlocks>;
inline constexpr std::uint32_t kThreadQuads = kLeafQuads / kWarpThreads;  // 8

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

// A piece as the part [begin, end) of the image.
struct Span {
  std::byte* data = nullptr;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

// Where a warp's leaf comes from or goes to. Kept from leaf to leaf, whose pieces are mostly the
// same ones.
struct LeafPlace {
  std::uint32_t piece = 0;  // The one that has the leaf's first byte,
  Span span;                // and its place; empty where there is none.
  std::uint32_t end_piece = 0;
};

template <class Block>
STILLFRAME_DEVICE Span load_span(Block& block, const PackJob& job, std::uint32_t piece,
                                 std::uint32_t end_piece) {
  if (piece >= end_piece) return {};
  const Piece& one = job.pieces[piece];
  const std::uint64_t begin = block.load(&one.image_offset);
  return {.data = block.load(&one.data), .begin = begin, .end = begin + block.load(&one.bytes)};
}

// The pieces that an extent may need.
template <class Block>
STILLFRAME_DEVICE LeafPlace find_extent(Block& block, const PackJob& job, std::uint64_t extent) {
  LeafPlace place;
  // One piece may begin in this extent and end in the next.
  const std::uint32_t behind = block.load(&job.first_piece[extent + 1]);
  const std::uint32_t piece_count =
      block.load(&job.first_piece[(job.image_bytes + kExtentBytes - 1) / kExtentBytes]);
  place.end_piece = behind < piece_count ? behind + 1 : piece_count;
  place.piece = block.load(&job.first_piece[extent]);
  place.span = load_span(block, job, place.piece, place.end_piece);
  return place;
}

template <class Block>
STILLFRAME_DEVICE void find_leaf(Block& block, const PackJob& job, std::uint64_t offset,
                                 LeafPlace& place) {
  if (offset < place.span.end) return;
  place.piece = find_piece(block, job.pieces, place.piece, place.end_piece, offset);
  place.span = load_span(block, job, place.piece, place.end_piece);
}

// The 16 bytes from `shift` bytes behind the first one's begin on.
STILLFRAME_DEVICE Quad funnel(const Quad& first, const Quad& second, std::uint32_t shift) {
  const bool is_far = shift >= 8;
  const std::uint64_t words[3] = {is_far ? first.high : first.low, is_far ? second.low : first.high,
                                  is_far ? second.high : second.low};
  const std::uint32_t bits = shift % 8 * 8;
  if (bits == 0) return {.low = words[0], .high = words[1]};
  return {.low = words[0] >> bits | words[1] << (64 - bits),
          .high = words[1] >> bits | words[2] << (64 - bits)};
}

// The 16 bytes of the image from `offset` on, zeros behind its end.
template <class Block>
STILLFRAME_DEVICE Quad gather_quad(Block& block, const PackJob& job, const LeafPlace& place,
                                   std::uint64_t offset) {
  const std::uint32_t piece = find_piece(block, job.pieces, place.piece, place.end_piece, offset);
  const Span span = load_span(block, job, piece, place.end_piece);
  const std::byte* const address = span.data + (offset - span.begin);
  const auto shift = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(address) % 16);
  // The aligned loads around a misaligned one must not leave the piece.
  if (span.begin + shift <= offset && offset + 32 - shift <= span.end) {
    const Quad* const quads = reinterpret_cast<const Quad*>(address - shift);
    return funnel(block.load(quads), block.load(quads + (shift == 0 ? 0 : 1)), shift);
  }
  Quad quad;
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

// Where a thread's i-th Quad of a leaf lies in it.
STILLFRAME_DEVICE std::uint32_t quad_at(std::uint32_t thread, std::uint32_t i) {
  return (i * kWarpThreads + thread % kWarpThreads) * 16;
}

// A thread's share of a leaf. The loads are all issued before the first of them is needed: it is
// their number that keeps a GPU's memory busy.
template <class Block>
STILLFRAME_DEVICE void gather_leaf(Block& block, const PackJob& job, const LeafPlace& place,
                                   std::uint64_t leaf_offset, std::uint32_t thread, Leaf& leaf) {
  const Span span = place.span;
  const std::byte* const data = span.data + (leaf_offset - span.begin);
  const auto shift = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(data) % 16);
  const bool is_whole = span.begin <= leaf_offset && leaf_offset + kLeafBytes <= span.end;
  // All of a leaf whose neighbours may be touched, or that is aligned; else Quad by Quad.
  if (is_whole && (shift == 0 || (span.begin + shift <= leaf_offset &&
                                  leaf_offset + kLeafBytes + 16 - shift <= span.end))) {
    const std::byte* const aligned = data - shift;
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      leaf.quads[i] = block.load(reinterpret_cast<const Quad*>(aligned + quad_at(thread, i)));
    }
    if (shift == 0) return;
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      const auto* const next = reinterpret_cast<const Quad*>(aligned + quad_at(thread, i) + 16);
      leaf.quads[i] = funnel(leaf.quads[i], block.load(next), shift);
    }
    return;
  }
  // Those that lie in the first piece, or in what it leaves to the next one, at once.
  const Span second = load_span(block, job, place.piece + 1, place.end_piece);
  std::uint32_t missing = 0;
  STILLFRAME_UNROLL
  for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
    const std::uint64_t offset = leaf_offset + quad_at(thread, i);
    const bool is_first = offset < span.end;
    const std::uint64_t begin = is_first ? span.begin : second.begin;
    const std::byte* const address = (is_first ? span.data : second.data) + (offset - begin);
    if (begin <= offset && offset + 16 <= (is_first ? span.end : second.end) &&
        reinterpret_cast<std::uintptr_t>(address) % 16 == 0) {
      leaf.quads[i] = block.load(reinterpret_cast<const Quad*>(address));
    } else {
      missing |= 1U << i;
    }
  }
  for (std::uint32_t at = 0; missing >> at != 0; ++at) {
    if ((missing >> at & 1U) == 0) continue;
    const Quad quad = gather_quad(block, job, place, leaf_offset + quad_at(thread, at));
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      if (i == at) leaf.quads[i] = quad;
    }
  }
}

// Stores a thread's share of a leaf to its pieces; bytes behind the end of the image then count as
// zeros, whatever they are.
template <class Block>
STILLFRAME_DEVICE void scatter_leaf(Block& block, const PackJob& job, const LeafPlace& place,
                                    std::uint64_t leaf_offset, std::uint32_t thread, Leaf& leaf) {
  const Span span = place.span;
  std::byte* const data = span.data + (leaf_offset - span.begin);
  if (span.begin <= leaf_offset && leaf_offset + kLeafBytes <= span.end &&
      reinterpret_cast<std::uintptr_t>(data) % 16 == 0) {
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      block.store(reinterpret_cast<Quad*>(data + quad_at(thread, i)), leaf.quads[i]);
    }
    return;
  }
  for (std::uint32_t at = 0; at < kThreadQuads; ++at) {
    const std::uint64_t offset = leaf_offset + quad_at(thread, at);
    Quad quad;
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      if (i == at) quad = leaf.quads[i];
    }
    scatter_quad(block, job, place, offset, quad);
    const std::uint64_t rest = offset < job.image_bytes ? job.image_bytes - offset : 0;
    if (rest >= 16) continue;
    quad.low &= rest == 0   ? 0
                : rest >= 8 ? ~std::uint64_t{0}
                            : ~std::uint64_t{0} >> (64 - rest * 8);
    quad.high &= rest <= 8 ? 0 : ~std::uint64_t{0} >> (128 - rest * 8);
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      if (i == at) leaf.quads[i] = quad;
    }
  }
}

// Moves one leaf, from its pieces to the image or from the image to its pieces, and keeps it.
template <bool kPacks, class Block>
STILLFRAME_DEVICE void move_leaf(Block& block, const PackJob& job, LeafPlace& place,
                                 std::uint64_t leaf_offset, std::uint32_t thread, Leaf& leaf) {
  if (leaf_offset >= job.image_bytes) return;
  find_leaf(block, job, leaf_offset, place);
  Quad* const image =
      reinterpret_cast<Quad*>(job.image + (leaf_offset - job.first_extent * kExtentBytes)) +
      thread % kWarpThreads;
  if (kPacks) {
    gather_leaf(block, job, place, leaf_offset, thread, leaf);
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      block.store(image + i * kWarpThreads, leaf.quads[i]);
    }
  } else {
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kThreadQuads; ++i) {
      leaf.quads[i] = block.load(image + i * kWarpThreads);
    }
    scatter_leaf(block, job, place, leaf_offset, thread, leaf);
  }
}

// Moves an extent and gives thread 0 its hash. `shared_at` is where its leaf hashes go, another
// place than the last extent's.
template <bool kPacks, class Block>
STILLFRAME_DEVICE void move_extent(Block& block, const PackJob& job, std::uint64_t extent,
                                   std::uint32_t shared_at,
                                   typename Block::template PerThread<HashKeys>& keys,
                                   typename Block::template PerThread<std::uint64_t>& hash) {
  typename Block::template PerThread<LeafPlace> place;
  block.each([&](std::uint32_t thread) { place[thread] = find_extent(block, job, extent); });
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    typename Block::template PerThread<Leaf> leaf;
    block.each([&](std::uint32_t thread) {
      const std::uint32_t index = round * kWarps + thread / kWarpThreads;
      move_leaf<kPacks>(block, job, place[thread], extent * kExtentBytes + index * kLeafBytes,
                        thread, leaf[thread]);
    });
    hash_by_warps<kLeafBlocks>(block, leaf, keys, hash);
    block.each([&](std::uint32_t thread) {
      if (thread % kWarpThreads != 0) return;
      const std::uint32_t index = round * kWarps + thread / kWarpThreads;
      // Leaves that a short last extent lacks count as 0.
      const bool is_there = extent * kExtentBytes + index * kLeafBytes < job.image_bytes;
      block.shared().store(thread, shared_at + index * 8, is_there ? hash[thread] : 0);
    });
  }
  block.barrier();
  constexpr std::uint32_t kBlocks = kLeafHashBytes / kHashBlockBytes;
  typename Block::template PerThread<HashInput<kBlocks>> hashes;
  block.each([&](std::uint32_t thread) {
    STILLFRAME_UNROLL
    for (std::uint32_t i = 0; i < kBlocks * kQuadsPerBlock; ++i) {
      const std::uint32_t at = (i * kWarpThreads + thread % kWarpThreads) * 16;
      hashes[thread].quads[i] = block.shared().template load<Quad>(thread, shared_at + at);
    }
  });
  hash_by_warps<kBlocks>(block, hashes, keys, hash);
}

// Calls done(i, hash) in thread 0 for each extent i of the job that is this block's.
template <bool kPacks, class Block, class Done>
STILLFRAME_DEVICE void move_extents(Block& block, const PackJob& job, Done&& done) {
  typename Block::template PerThread<HashKeys> keys;
  block.each([&](std::uint32_t thread) { keys[thread] = hash_keys(thread); });
  std::uint32_t shared_at = 0;
  for (std::uint64_t i = block.index(); i < job.extent_count; i += block.count()) {
    typename Block::template PerThread<std::uint64_t> hash;
    move_extent<kPacks>(block, job, job.first_extent + i, shared_at, keys, hash);
    block.each([&](std::uint32_t thread) {
      if (thread == 0) done(i, hash[thread]);
    });
    // Behind the next extent's barrier all have read this one's.
    shared_at = kLeafHashBytes - shared_at;
  }
}

template <class Block>
STILLFRAME_DEVICE void pack(Block& block, const PackJob& job) {
  move_extents<true>(block, job, [&](std::uint64_t extent, std::uint64_t hash) {
    block.store(&job.extent_hashes[extent], hash);
  });
}

template <class Block>
STILLFRAME_DEVICE void unpack(Block& block, const PackJob& job) {
  move_extents<false>(block, job, [&](std::uint64_t extent, std::uint64_t hash) {
    const bool is_damaged = block.load(&job.extent_hashes[extent]) != hash;
    block.store(&job.damaged[extent], std::uint32_t{is_damaged ? 1U : 0U});
  });
}

}  // namespace stillframe::kernels
