#pragma once

#include "kernels/block.h"

// XXH3-64 with seed 0 of whole leaves, by a warp each, and of the leaf hashes of an extent. The
// algorithm and its constants are xxHash's (Yann Collet, BSD-2-Clause, doc/xxhash_spec.md there);
// base/hash.h has the same by the library, and tests hold them together.
//
// Inputs here have whole stripes of 64 bytes, more than 240 bytes, and end with a full block of 16
// stripes: 4096 and 2048 bytes do. Sums within a block of stripes commute, so four groups of eight
// threads, one for each of the eight accumulators, take four stripes of it each.
namespace stillframe::kernels {

inline constexpr std::uint32_t kStripeBytes = 64;
inline constexpr std::uint32_t kStripesPerBlock = 16;
inline constexpr std::uint32_t kHashBlockBytes = kStripeBytes * kStripesPerBlock;  // 1024
inline constexpr std::uint32_t kAccumulators = 8;
inline constexpr std::uint32_t kGroups = kWarpThreads / kAccumulators;  // 4

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

// Every warp w hashes the `bytes` of shared memory from `begin + w * stride` on, a multiple of
// 1024; its thread 0 then has the hash. All warps of the block call it together, with shared memory
// written before a barrier; warps from `warp_count` on only take part.
template <class Block>
STILLFRAME_DEVICE void hash_by_warps(Block& block, std::uint32_t begin, std::uint32_t stride,
                                     std::uint32_t bytes, std::uint32_t warp_count,
                                     typename Block::template PerThread<std::uint64_t>& hash) {
  typename Block::template PerThread<std::uint64_t> accumulator;
  typename Block::template PerThread<std::uint64_t> products;
  typename Block::template PerThread<std::uint64_t> values;
  block.each([&](std::uint32_t thread) {
    accumulator[thread] = kFirstAccumulators[thread % kAccumulators];
  });
  const std::uint32_t block_count = bytes / kHashBlockBytes;
  for (std::uint32_t at = 0; at < block_count; ++at) {
    const bool is_last = at + 1 == block_count;
    block.each([&](std::uint32_t thread) {
      const std::uint32_t lane = thread % kAccumulators;
      const std::uint32_t group = thread % kWarpThreads / kAccumulators;
      const std::uint32_t warp = thread / kWarpThreads;
      std::uint64_t product_sum = 0;
      std::uint64_t value_sum = 0;
      for (std::uint32_t step = 0; step < kStripesPerBlock / kGroups && warp < warp_count; ++step) {
        const std::uint32_t stripe = step * kGroups + group;
        const std::uint32_t offset =
            begin + warp * stride + at * kHashBlockBytes + stripe * kStripeBytes + lane * 8;
        const std::uint64_t value = block.shared().template load<std::uint64_t>(thread, offset);
        // The input's last stripe has a place in the secret of its own: 7 bytes before the end.
        const bool is_last_stripe = is_last && stripe + 1 == kStripesPerBlock;
        const std::uint64_t key =
            value ^ (is_last_stripe ? secret_at(121 + lane * 8) : kSecret[stripe + lane]);
        product_sum += (key & 0xFFFFFFFF) * (key >> 32);
        value_sum += value;
      }
      products[thread] = product_sum;
      values[thread] = value_sum;
    });
    for (std::uint32_t mask = kAccumulators; mask < kWarpThreads; mask *= 2) {
      block.add_across(products, mask);
      block.add_across(values, mask);
    }
    // Each value goes to the neighbour's accumulator.
    block.shuffle_across(values, 1);
    block.each([&](std::uint32_t thread) {
      std::uint64_t sum = accumulator[thread] + products[thread] + values[thread];
      if (!is_last) {
        sum ^= sum >> 47;
        sum ^= kSecret[16 + thread % kAccumulators];
        sum *= kPrime32First;
      }
      accumulator[thread] = sum;
    });
  }
  // Pairs of accumulators, folded; then the sum of the four pairs.
  block.each([&](std::uint32_t thread) {
    values[thread] = accumulator[thread] ^ secret_at(11 + thread % kAccumulators * 8);
    products[thread] = values[thread];
  });
  block.shuffle_across(values, 1);
  block.each([&](std::uint32_t thread) {
    products[thread] = thread % 2 == 0 ? fold_product(products[thread], values[thread]) : 0;
  });
  for (std::uint32_t mask = 1; mask < kAccumulators; mask *= 2) block.add_across(products, mask);
  block.each([&](std::uint32_t thread) {
    std::uint64_t sum = bytes * kPrime64First + products[thread];
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9;
    hash[thread] = sum ^ sum >> 32;
  });
}

}  // namespace stillframe::kernels
