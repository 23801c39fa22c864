#include <limits>

#include "base/text.h"
#include "format/manifest.h"

namespace stillframe::format {

namespace {

constexpr std::size_t kSumBytes = 8;

Error damaged(std::string_view why) {
  return Error(Code::kDataLoss, concat("manifest.sums: ", why));
}

void append_sums(std::string& text, const std::vector<std::uint64_t>& hashes) {
  // Little-endian in memory as in the file; base/hash.cc asserts it.
  text.append(reinterpret_cast<const char*>(hashes.data()), hashes.size() * kSumBytes);
}

// Sums that the manifest calls for; nullopt beyond 64 bits.
std::optional<std::uint64_t> sums_bytes(const Manifest& manifest) {
  std::optional<std::uint64_t> bytes = 0;
  for (const ManifestPart& part : manifest.parts) {
    // At most 2^44 extents a part, so the product fits.
    bytes = checked_add(*bytes, extent_count(part.bytes) * kSumBytes);
    if (!bytes) return std::nullopt;
  }
  return bytes;
}

}  // namespace

std::string encode_sums(const std::vector<std::vector<std::uint64_t>>& extent_hashes_by_part) {
  std::string text;
  for (const auto& hashes : extent_hashes_by_part) append_sums(text, hashes);
  return text;
}

Hash128 root_of(const std::vector<std::uint64_t>& extent_hashes) {
  return hash128(std::as_bytes(std::span(extent_hashes)));
}

Result<std::vector<std::vector<std::uint64_t>>> decode_sums(const Manifest& manifest,
                                                            std::string_view sums) {
  const auto bytes = sums_bytes(manifest);
  if (!bytes || sums.size() != *bytes || manifest.sums.bytes != *bytes) {
    return damaged(concat("has ", sums.size(), " bytes; the manifest says ", manifest.sums.bytes,
                          " and its parts need ",
                          bytes.value_or(std::numeric_limits<std::uint64_t>::max())));
  }
  if (hash128(sums) != manifest.sums.hash) {
    return damaged(concat("its hash is ", to_hex(hash128(sums)), ", the manifest says ",
                          to_hex(manifest.sums.hash)));
  }
  std::vector<std::vector<std::uint64_t>> hashes_by_part;
  hashes_by_part.reserve(manifest.parts.size());
  const std::byte* source = std::as_bytes(std::span(sums)).data();
  for (const ManifestPart& part : manifest.parts) {
    std::vector<std::uint64_t> hashes(extent_count(part.bytes));
    for (std::uint64_t& hash : hashes) {
      hash = load_u64(source);
      source += kSumBytes;
    }
    if (root_of(hashes) != part.root) {
      return damaged(concat("the root of ", part.file, " is ", to_hex(root_of(hashes)),
                            ", the manifest says ", to_hex(part.root)));
    }
    hashes_by_part.push_back(std::move(hashes));
  }
  return hashes_by_part;
}

}  // namespace stillframe::format
