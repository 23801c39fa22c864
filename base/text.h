#pragma once

#include <charconv>
#include <concepts>
#include <string>
#include <string_view>

namespace stillframe {

namespace text_detail {

inline void append(std::string& text, std::string_view piece) { text.append(piece); }
inline void append(std::string& text, char piece) { text.push_back(piece); }

template <class Number>
requires(std::integral<Number> || std::floating_point<Number>) &&
    (!std::same_as<Number, char>)void append(std::string& text, Number piece) {
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof digits, piece);
  text.append(digits, end.ptr);
}

}  // namespace text_detail

// Puts text and numbers together: concat("arena: need ", 3, " slots, ", 1, " free"). Independent of
// the locale. For messages; formats with columns or widths belong to cli/ and daemon/, which have
// fmt.
template <class... Pieces>
std::string concat(const Pieces&... pieces) {
  std::string text;
  (text_detail::append(text, pieces), ...);
  return text;
}

}  // namespace stillframe
