#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"

// The inner loops of host_copy, compiled once per instruction set. Internal to kernels.
namespace stillframe::kernels {

// A unit fits the first-level cache, so that one trip to memory serves the copy and the hash.
inline constexpr std::size_t kUnitBytes = 32 * 1024;
inline constexpr std::size_t kLeavesPerUnit = kUnitBytes / kLeafBytes;
// What non-temporal stores write whole.
inline constexpr std::size_t kLineBytes = 64;

struct UnitKernels {
  // XXH3-64 of each of `leaf_count` leaves from `source` on.
  using Hash = void (*)(const std::byte* source, std::size_t leaf_count, std::uint64_t* leaves);
  // Any alignment, any length.
  using Copy = void (*)(std::byte* target, const std::byte* source, std::size_t bytes);
  // One to kLeavesPerUnit leaves, at any alignment.
  using CopyAndHash = void (*)(std::byte* target, const std::byte* source, std::size_t leaf_count,
                               std::uint64_t* leaves);
  Hash hash;
  Copy copy[3];                  // By CopyForm.
  CopyAndHash copy_and_hash[3];  // By CopyForm.
};

// Null when this build does not contain the instruction set. Whether the CPU runs it is the
// caller's question.
const UnitKernels* plain_unit_kernels() noexcept;
const UnitKernels* avx2_unit_kernels() noexcept;
const UnitKernels* avx512_unit_kernels() noexcept;

}  // namespace stillframe::kernels
