#include <string>

#include "base/check.h"
#include "base/text.h"
#include "format/manifest.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

using namespace format;

namespace {

constexpr unsigned kSealsFile = 1;   // The manifest states the true hash of manifest.sums,
constexpr unsigned kSealsRoots = 2;  // and the true roots.

// The roots that would be right, as far as the sums go.
void seal_roots(Manifest& manifest, std::string_view sums) {
  for (ManifestPart& part : manifest.parts) {
    const std::uint64_t count = extent_count(part.bytes);
    if (count > sums.size() / 8) return;
    part.root = hash128(sums.substr(0, count * 8));
    sums.remove_prefix(count * 8);
  }
}

}  // namespace

bool sums(ConstBytes input) {
  if (input.size() < 2) return false;
  const auto flags = std::to_integer<unsigned>(input[0]);
  const auto part_count = std::to_integer<std::size_t>(input[1]);
  input = input.subspan(2);
  Manifest manifest;
  for (std::size_t i = 0; i < part_count && input.size() >= 8; ++i) {
    manifest.parts.push_back(
        {.file = concat(i, ".safetensors"), .bytes = load_u64(input.data()), .root = {}});
    input = input.subspan(8);
  }
  const std::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
  manifest.sums = {.file = "manifest.sums", .bytes = text.size(), .hash = {}};
  if ((flags & kSealsFile) != 0) manifest.sums.hash = hash128(text);
  if ((flags & kSealsRoots) != 0) seal_roots(manifest, text);

  const auto hashes = decode_sums(manifest, text);
  if (!hashes) {
    check(hashes.error().code() == Code::kDataLoss, "bad bytes are data loss");
    return false;
  }
  check(hashes->size() == manifest.parts.size(), "each part has its sums");
  check(encode_sums(*hashes) == text, "round trip");
  for (std::size_t i = 0; i < hashes->size(); ++i) {
    check((*hashes)[i].size() == extent_count(manifest.parts[i].bytes), "one sum an extent");
    check(root_of((*hashes)[i]) == manifest.parts[i].root, "the root is theirs");
  }
  return true;
}

}  // namespace stillframe::fuzz
