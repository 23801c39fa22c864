#pragma once

#include "kernels/block.h"

// XXH3-64 with seed 0 of whole leaves, by a warp each, and of the leaf hashes of an extent. The
// algorithm and its constants are xxHash's (Yann Collet, BSD-2-Clause, doc/xxhash_spec.md there);
// base/hash.h has the same by the library, and tests hold them together.
//
// Inputs here have whole stripes of 64 bytes, more than 240 bytes, and end with a full block of 16
// stripes: 4096 and 2048 bytes do. A warp has its input in registers, as it was loaded: Quad i of
// thread t is the (32 i + t)-th of the input, so that four threads have a stripe and each of them
// two of its eight accumulators. Sums within a block of stripes commute, so each thread adds up its
// own stripes before the eight groups of four threads are added.
namespace stillframe::kernels {

inline constexpr std::uint32_t kStripeBytes = 64;
inline constexpr std::uint32_t kStripesPerBlock = 16;
inline constexpr std::uint32_t kHashBlockBytes = kStripeBytes * kStripesPerBlock;  // 1024
inline constexpr std::uint32_t kAccumulators = 8;
// Of a block, that a thread holds, and of a stripe.
inline constexpr std::uint32_t kQuadsPerBlock = kHashBlockBytes / 16 / kWarpThreads;  // 2
inline constexpr std::uint32_t kQuadsPerStripe = kStripeBytes / 16;                   // 4

inline constexpr std::uint64_t kPrime32First = 0x9E3779B1;
inline constexpr std::uint64_t kPrime64First = 0x9E3779B185EBCA87;

// The default secret, as little-endian words.
STILLFRAME_DEVICE_TABLE std::uint64_t kSecret[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};

// What the accumulators begin with: the primes in the order of the specification.
STILLFRAME_DEVICE_TABLE std::uint64_t kFirstAccumulators[kAccumulators] = {
    0x00000000C2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x0000000085EBCA77, 0x27D4EB2F165667C5, 0x000000009E3779B1};

// The 8 bytes of the secret from `offset` on, whatever its alignment.
STILLFRAME_DEVICE std::uint64_t secret_at(std::uint32_t offset) {
  const std::uint32_t word = offset / 8;
  const std::uint32_t shift = offset % 8 * 8;
  if (shift == 0) return kSecret[word];
  return kSecret[word] >> shift | kSecret[word + 1] << (64 - shift);
}

STILLFRAME_DEVICE std::uint64_t fold_product(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

// What a warp hashes, one 32nd of it.
template <std::uint32_t kBlocks>
struct HashInput {
  Quad quads[kBlocks * kQuadsPerBlock];
};

// A thread's part of the secret, which every hash needs: on a GPU a table that threads of a warp
// read at different places is slow.
struct HashKeys {
  Quad stripes[kQuadsPerBlock];
  Quad last_stripe;  // The input's last one has a place in the secret of its own.
  std::uint64_t scramble = 0;
  std::uint64_t merge = 0;
};

STILLFRAME_DEVICE HashKeys hash_keys(std::uint32_t thread) {
  HashKeys keys;
  const std::uint32_t pair = thread % kQuadsPerStripe * 2;
  const std::uint32_t group = thread % kWarpThreads / kQuadsPerStripe;
  STILLFRAME_UNROLL
  for (std::uint32_t i = 0; i < kQuadsPerBlock; ++i) {
    const std::uint32_t stripe = i * (kWarpThreads / kQuadsPerStripe) + group;
    keys.stripes[i] = {.low = kSecret[stripe + pair], .high = kSecret[stripe + pair + 1]};
  }
  const bool is_last = group + 1 == kWarpThreads / kQuadsPerStripe;
  // 7 bytes before the end of the secret's first 192.
  keys.last_stripe =
      is_last ? Quad{.low = secret_at(121 + pair * 8), .high = secret_at(121 + pair * 8 + 8)}
              : keys.stripes[kQuadsPerBlock - 1];
  const std::uint32_t accumulator = pair + group % 2;
  keys.scramble = kSecret[16 + accumulator];
  keys.merge = secret_at(11 + accumulator * 8);
  return keys;
}

STILLFRAME_DEVICE std::uint64_t half_product(std::uint64_t key) {
  return (key & 0xFFFFFFFF) * (key >> 32);
}

// Every warp hashes its input; its thread 0 then has the hash. All warps of the block call it
// together.
template <std::uint32_t kBlocks, class Block>
STILLFRAME_DEVICE void hash_by_warps(Block& block,
                                     typename Block::template PerThread<HashInput<kBlocks>>& input,
                                     typename Block::template PerThread<HashKeys>& keys,
                                     typename Block::template PerThread<std::uint64_t>& hash) {
  // Each thread ends with one accumulator, which three others have too.
  typename Block::template PerThread<std::uint64_t> accumulator;
  typename Block::template PerThread<std::uint64_t> kept;
  typename Block::template PerThread<std::uint64_t> given;
  block.each([&](std::uint32_t thread) {
    accumulator[thread] =
        kFirstAccumulators[thread % kQuadsPerStripe * 2 + thread / kQuadsPerStripe % 2];
  });
  STILLFRAME_UNROLL
  for (std::uint32_t at = 0; at < kBlocks; ++at) {
    const bool is_last = at + 1 == kBlocks;
    block.each([&](std::uint32_t thread) {
      std::uint64_t even = 0;
      std::uint64_t odd = 0;
      STILLFRAME_UNROLL
      for (std::uint32_t i = 0; i < kQuadsPerBlock; ++i) {
        const Quad value = input[thread].quads[at * kQuadsPerBlock + i];
        const Quad key =
            is_last && i + 1 == kQuadsPerBlock ? keys[thread].last_stripe : keys[thread].stripes[i];
        // Each value goes to the neighbour's accumulator.
        even += half_product(value.low ^ key.low) + value.high;
        odd += half_product(value.high ^ key.high) + value.low;
      }
      const bool has_odd = thread / kQuadsPerStripe % 2 != 0;
      kept[thread] = has_odd ? odd : even;
      given[thread] = has_odd ? even : odd;
    });
    block.shuffle_across(given, kQuadsPerStripe);
    block.each([&](std::uint32_t thread) { kept[thread] += given[thread]; });
    STILLFRAME_UNROLL
    for (std::uint32_t mask = kAccumulators; mask < kWarpThreads; mask *= 2) {
      block.add_across(kept, mask);
    }
    block.each([&](std::uint32_t thread) {
      std::uint64_t sum = accumulator[thread] + kept[thread];
      if (!is_last) {
        sum ^= sum >> 47;
        sum ^= keys[thread].scramble;
        sum *= kPrime32First;
      }
      accumulator[thread] = sum;
    });
  }
  // Pairs of accumulators, folded; then the sum of the four pairs.
  block.each([&](std::uint32_t thread) {
    kept[thread] = accumulator[thread] ^ keys[thread].merge;
    given[thread] = kept[thread];
  });
  block.shuffle_across(given, kQuadsPerStripe);
  block.each(
      [&](std::uint32_t thread) { kept[thread] = fold_product(kept[thread], given[thread]); });
  STILLFRAME_UNROLL
  for (std::uint32_t mask = 1; mask < kQuadsPerStripe; mask *= 2) block.add_across(kept, mask);
  block.each([&](std::uint32_t thread) {
    std::uint64_t sum = std::uint64_t{kBlocks} * kHashBlockBytes * kPrime64First + kept[thread];
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9;
    hash[thread] = sum ^ sum >> 32;
  });
}

}  // namespace stillframe::kernels
