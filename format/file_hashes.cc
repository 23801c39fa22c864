#include "format/file_hashes.h"

#include <algorithm>
#include <charconv>

#include "base/check.h"
#include "base/hash.h"
#include "base/text.h"
#include "format/manifest.h"

namespace stillframe::format {

namespace {

Error damage(std::string message) { return Error(Code::kDataLoss, std::move(message)); }

bool is_digit(char c) noexcept { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

}  // namespace

std::string blank_file_hashes(std::uint64_t extent_count) {
  return std::string(extent_count * kFileHashDigits, '0');
}

bool has_file_hashes(const PartImage& image) noexcept {
  return image.metadata.contains(std::string(kFileHashesKey)) ||
         image.metadata.contains(std::string(kFileStateKey));
}

Result<std::vector<std::uint64_t>> decode_file_hashes(const PartImage& image) {
  const auto found = image.metadata.find(std::string(kFileHashesKey));
  if (found == image.metadata.end() || !image.metadata.contains(std::string(kFileStateKey))) {
    return damage(concat("the header has only one of ", kFileHashesKey, " and ", kFileStateKey));
  }
  const std::string_view digits = found->second;
  const std::uint64_t count = extent_count(image.bytes);
  if (digits.size() != count * kFileHashDigits || !std::ranges::all_of(digits, is_digit)) {
    return damage(concat("the header's ", kFileHashesKey, " are not ", count, " hashes"));
  }
  std::vector<std::uint64_t> hashes(count, 0);
  for (std::uint64_t i = 0; i < count; ++i) {
    const char* const first = digits.data() + i * kFileHashDigits;
    (void)std::from_chars(first, first + kFileHashDigits, hashes[i], 16);
  }
  return hashes;
}

std::span<char> find_file_hashes(std::span<char> header) noexcept {
  // Nothing else in a header looks like this: inside of a text, every quote has a backslash before
  // it, and a tensor of that name is followed by an object.
  const std::string key = concat('"', kFileHashesKey, "\":\"");
  const std::string_view text(header.data(), header.size());
  const std::size_t at = text.find(key);
  if (at == std::string_view::npos) return {};
  const std::size_t begin = at + key.size();
  const std::size_t end = text.find('"', begin);
  if (end == std::string_view::npos) return {};
  return header.subspan(begin, end - begin);
}

void fill_file_hashes(std::span<char> digits, std::span<const std::uint64_t> hashes) {
  check(digits.size() == hashes.size() * kFileHashDigits, "the hashes fit into their place");
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    std::ranges::copy(to_hex(hashes[i]),
                      digits.begin() + static_cast<std::ptrdiff_t>(i * kFileHashDigits));
  }
}

}  // namespace stillframe::format
