#pragma once

// Text from outside: what may be a name, and how to show what may not.

#include <string>
#include <string_view>

namespace stillframe::format {

// Well-formed UTF-8 as RFC 3629 has it: no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text) noexcept;

// The same, and without control characters (U+0000 to U+001F, U+007F to U+009F).
bool is_plain_utf8(std::string_view text) noexcept;

// In quotes, for messages: bytes other than printable ASCII as \xNN, cut after 80 bytes.
std::string printable(std::string_view text);

}  // namespace stillframe::format
