#pragma once

// A safetensors file that carries the hashes of its own extents, in its metadata, as one text of
// hexadecimal digits. docs/FORMAT.md section 9 is normative.
//
// The digits are part of what they guard: hashes are those of the file while every digit is '0'.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "format/safetensors.h"

namespace stillframe::format {

inline constexpr std::string_view kFileHashesKey = "stillframe.hashes";
inline constexpr std::string_view kFileStateKey = "stillframe.state";
inline constexpr std::size_t kFileHashDigits = 16;  // Of one extent.

// The metadata text that holds the place of `extent_count` hashes.
std::string blank_file_hashes(std::uint64_t extent_count);

// Whether a file claims to be one of ours. It does when it has either key, so that no single
// damaged byte makes it a stranger that nobody checks.
bool has_file_hashes(const PartImage& image) noexcept;

// The hashes that an image's metadata holds, one per extent. kDataLoss: they or the state are
// missing, or are not as many as the file has extents, or are no lower-case digits.
Result<std::vector<std::uint64_t>> decode_file_hashes(const PartImage& image);

// The digits inside a header that has_file_hashes(): a view into `header`, empty if there are none.
std::span<char> find_file_hashes(std::span<char> header) noexcept;

// Writes the hashes over the digits; as many as blank_file_hashes() was given.
void fill_file_hashes(std::span<char> digits, std::span<const std::uint64_t> hashes);

}  // namespace stillframe::format
