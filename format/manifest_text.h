#pragma once

// The pieces of a manifest's text that its encoder and its decoder share.

#include <string>
#include <string_view>

namespace stillframe::format {

// The version is first and the checksum last in every version to come, so that a reader can tell a
// damaged file from a newer one.
inline constexpr std::string_view kManifestStart = "{\n  \"format_version\": ";
inline constexpr std::string_view kChecksumStart = "\"checksum\": \"";
inline constexpr std::string_view kChecksumEnd = "\"\n}\n";
inline constexpr std::size_t kChecksumDigits = 32;
inline constexpr std::size_t kChecksumTailBytes =
    kChecksumStart.size() + kChecksumDigits + kChecksumEnd.size();

// The shortest decimal that reads back as the same double, with a '.' or an exponent; "NaN",
// "Infinity" and "-Infinity" in quotes.
std::string metric_text(double value);

}  // namespace stillframe::format
