#include "format/utf8.h"

#include <cstdint>

namespace stillframe::format {

namespace {

// One character at the start of `text`: its length in bytes and value; length 0 when ill-formed.
struct Character {
  std::size_t bytes = 0;
  std::uint32_t value = 0;
};

Character first_character(std::string_view text) noexcept {
  const auto byte = [text](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return {.bytes = 1, .value = lead};

  const std::size_t bytes = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  // 0x80 to 0xC1 continue a character or start an overlong one; beyond 0xF4 lies no character.
  if (lead < 0xC2 || lead > 0xF4 || text.size() < bytes) return {};
  std::uint32_t value = lead & (0xFFU >> (bytes + 1));
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xC0U) != 0x80U) return {};
    value = value << 6U | (byte(i) & 0x3FU);
  }
  const bool is_overlong = (bytes == 3 && value < 0x800) || (bytes == 4 && value < 0x10000);
  const bool is_surrogate = value >= 0xD800 && value <= 0xDFFF;
  if (is_overlong || is_surrogate || value > 0x10FFFF) return {};
  return {.bytes = bytes, .value = value};
}

bool is_control(std::uint32_t value) noexcept {
  return value < 0x20 || (value >= 0x7F && value <= 0x9F);
}

bool is_well_formed(std::string_view text, bool refuses_control) noexcept {
  while (!text.empty()) {
    const Character character = first_character(text);
    if (character.bytes == 0 || (refuses_control && is_control(character.value))) return false;
    text.remove_prefix(character.bytes);
  }
  return true;
}

}  // namespace

bool is_utf8(std::string_view text) noexcept { return is_well_formed(text, false); }

bool is_plain_utf8(std::string_view text) noexcept { return is_well_formed(text, true); }

std::string printable(std::string_view text) {
  constexpr std::size_t kShownBytes = 80;
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string shown = "\"";
  for (const char c : text.substr(0, kShownBytes)) {
    const auto byte = static_cast<std::uint8_t>(c);
    if (byte >= 0x20 && byte < 0x7F && c != '"' && c != '\\') {
      shown.push_back(c);
    } else {
      shown.append("\\x");
      shown.push_back(kDigits[byte >> 4U]);
      shown.push_back(kDigits[byte & 15U]);
    }
  }
  shown.append(text.size() > kShownBytes ? "...\"" : "\"");
  return shown;
}

}  // namespace stillframe::format
