#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>

namespace stillframe {

using Bytes = std::span<std::byte>;
using ConstBytes = std::span<const std::byte>;

// A leaf is what one XXH3-64 covers, an extent what one stored hash covers: docs/FORMAT.md.
// O_DIRECT offsets and lengths are multiples of a block; 4096 is also the floor that we assume
// where the file system reports a smaller alignment.
inline constexpr std::size_t kBlockBytes = 4096;
inline constexpr std::size_t kLeafBytes = 4096;
inline constexpr std::size_t kExtentBytes = std::size_t{1} << 20;
inline constexpr std::size_t kLeavesPerExtent = kExtentBytes / kLeafBytes;  // 256
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

constexpr std::uint64_t round_down(std::uint64_t value, std::uint64_t step) noexcept {
  return value - value % step;
}

// The caller has bounded `value`: it must be at most 2^64 - step.
constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t step) noexcept {
  return round_down(value + step - 1, step);
}

// Sums and products of numbers that came from outside: nullopt when they do not fit.
constexpr std::optional<std::uint64_t> checked_add(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}

constexpr std::optional<std::uint64_t> checked_multiply(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// Little-endian loads and stores. Every platform that we build for is little-endian, which hash.cc
// asserts; memcpy keeps them legal at any alignment.
inline std::uint64_t load_u64(const std::byte* source) noexcept {
  std::uint64_t value = 0;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void store_u64(std::byte* target, std::uint64_t value) noexcept {
  std::memcpy(target, &value, sizeof value);
}

}  // namespace stillframe
