#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/bytes.h"

namespace stillframe::client {

// Which blocks of 4 KiB of many tensors are looked at: all where they are few, else others each
// time, so that every tensor has its turn and every block of it some day.
class BlockSampler {
 public:
  static constexpr std::size_t kCountMax = 256;

  struct Block {
    std::size_t tensor = 0;
    std::uint64_t offset = 0;  // In the tensor.
    std::uint64_t bytes = 0;
  };
  // Of `tensor_count` tensors, of which none is empty: `bytes_of(i)` is the size of one. Valid
  // until the next call.
  template <class BytesOf>
  std::span<const Block> choose(std::size_t tensor_count, BytesOf bytes_of) {
    chosen_.clear();
    std::uint64_t block_count = 0;
    for (std::size_t i = 0; i < tensor_count && block_count <= kCountMax; ++i) {
      block_count += blocks_of(bytes_of(i));
    }
    if (block_count <= kCountMax) {
      for (std::size_t i = 0; i < tensor_count; ++i) {
        for (std::uint64_t block = 0; block < blocks_of(bytes_of(i)); ++block) {
          add(i, block, bytes_of(i));
        }
      }
      return chosen_;
    }
    for (std::size_t i = 0; i < kCountMax; ++i, ++turn_) {
      const std::size_t tensor = turn_ % tensor_count;
      add(tensor, scramble(turn_) % blocks_of(bytes_of(tensor)), bytes_of(tensor));
    }
    return chosen_;
  }

 private:
  static std::uint64_t blocks_of(std::uint64_t bytes) noexcept {
    return bytes / kBlockBytes + (bytes % kBlockBytes != 0 ? 1 : 0);
  }
  // A bijection that leaves no pattern between neighbours (the finalizer of SplitMix64).
  static std::uint64_t scramble(std::uint64_t value) noexcept {
    value += 0x9E3779B97F4A7C15U;
    value = (value ^ (value >> 30U)) * 0xBF58476D1CE4E5B9U;
    value = (value ^ (value >> 27U)) * 0x94D049BB133111EBU;
    return value ^ (value >> 31U);
  }
  void add(std::size_t tensor, std::uint64_t block, std::uint64_t bytes) {
    const std::uint64_t offset = block * kBlockBytes;
    chosen_.push_back({.tensor = tensor,
                       .offset = offset,
                       .bytes = std::min<std::uint64_t>(kBlockBytes, bytes - offset)});
  }

  std::vector<Block> chosen_;
  std::uint64_t turn_ = 0;  // Samples taken so far, over all times.
};

}  // namespace stillframe::client
