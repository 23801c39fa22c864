#include "base/hash.h"

#include <bit>
#include <charconv>
#include <cstring>

#include "base/check.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace stillframe {

static_assert(std::endian::native == std::endian::little, "the file format is little-endian");

namespace {

Hash128 hash128_of(const void* data, std::size_t bytes) noexcept {
  const XXH128_hash_t hash = XXH3_128bits(data, bytes);
  return {.low = hash.low64, .high = hash.high64};
}

}  // namespace

std::uint64_t hash64(ConstBytes bytes) noexcept { return XXH3_64bits(bytes.data(), bytes.size()); }

Hash128 hash128(ConstBytes bytes) noexcept { return hash128_of(bytes.data(), bytes.size()); }

Hash128 hash128(std::string_view text) noexcept { return hash128_of(text.data(), text.size()); }

std::string to_hex(std::uint64_t hash) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string hex(16, '0');
  for (std::size_t i = 0; i < 16; ++i) hex[15 - i] = kDigits[(hash >> (4 * i)) & 15U];
  return hex;
}

std::string to_hex(Hash128 hash) { return to_hex(hash.high) + to_hex(hash.low); }

Result<Hash128> parse_hash128(std::string_view hex) {
  const auto half = [](std::string_view digits, std::uint64_t& value) {
    // from_chars would take upper case too; an encoder that differs from ours is refused.
    if (digits.find_first_not_of("0123456789abcdef") != std::string_view::npos) return false;
    const auto end = digits.data() + digits.size();
    return std::from_chars(digits.data(), end, value, 16).ptr == end;
  };
  Hash128 hash;
  if (hex.size() != 32 || !half(hex.substr(0, 16), hash.high) || !half(hex.substr(16), hash.low)) {
    return Error(Code::kDataLoss, "not a 128-bit hash in 32 lower-case hexadecimal digits");
  }
  return hash;
}

std::uint64_t hash_extent_of(const LeafHashes& leaves) noexcept {
  return XXH3_64bits(leaves.data(), sizeof leaves);
}

std::uint64_t hash_extent(ConstBytes extent) noexcept {
  check(!extent.empty() && extent.size() <= kExtentBytes, "an extent has 1 byte to 1 MiB");
  LeafHashes leaves{};
  const std::size_t whole_count = extent.size() / kLeafBytes;
  for (std::size_t i = 0; i < whole_count; ++i) {
    leaves[i] = XXH3_64bits(extent.data() + i * kLeafBytes, kLeafBytes);
  }
  if (const std::size_t rest_bytes = extent.size() % kLeafBytes; rest_bytes != 0) {
    std::array<std::byte, kLeafBytes> last{};
    std::memcpy(last.data(), extent.data() + whole_count * kLeafBytes, rest_bytes);
    leaves[whole_count] = hash64(last);
  }
  return hash_extent_of(leaves);
}

}  // namespace stillframe
