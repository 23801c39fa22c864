#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/bytes.h"
#include "base/result.h"

namespace stillframe {

// XXH3 with seed 0. 64 bits guard a leaf and an extent, 128 bits a whole list or file.
// They find damage, not forgery: whoever can write the files can also write the hashes.
std::uint64_t hash64(ConstBytes bytes) noexcept;

struct Hash128 {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  bool operator==(const Hash128&) const = default;
};

Hash128 hash128(ConstBytes bytes) noexcept;
Hash128 hash128(std::string_view text) noexcept;

// 32 lower-case hexadecimal digits, high half first, as in `xxhsum -H2`.
std::string to_hex(Hash128 hash);
std::string to_hex(std::uint64_t hash);  // 16 digits.
Result<Hash128> parse_hash128(std::string_view hex);

// The hash of each leaf of one extent; those that a short last extent lacks stay 0.
using LeafHashes = std::array<std::uint64_t, kLeavesPerExtent>;

// XXH3-64 over the 256 leaf hashes as 2048 little-endian bytes.
std::uint64_t hash_extent_of(const LeafHashes& leaves) noexcept;

// The hash of one extent of an image, from its bytes: 1 to kExtentBytes of them. A last leaf that
// is short is hashed as if zero-filled; the bytes after the span are not read.
std::uint64_t hash_extent(ConstBytes extent) noexcept;

}  // namespace stillframe
