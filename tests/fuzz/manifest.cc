#include "format/manifest.h"

#include <string>

#include "base/check.h"
#include "base/text.h"
#include "format/manifest_text.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

using namespace format;

namespace {

bool decode(std::string_view text) {
  const auto manifest = decode_manifest(text);
  if (!manifest) {
    const Code code = manifest.error().code();
    check(code == Code::kDataLoss || code == Code::kInvalidArgument, "damaged or newer");
    return false;
  }
  check(encode_manifest(*manifest) == text, "a manifest has one text");
  check(check_manifest(*manifest).has_value(), "what decodes may be encoded");
  return true;
}

}  // namespace

bool manifest(ConstBytes input) {
  const std::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
  if (decode(text)) return true;
  // No mutation would ever guess a checksum, so the members are reached by giving it.
  return decode(concat(text, kChecksumStart, to_hex(hash128(text)), kChecksumEnd));
}

}  // namespace stillframe::fuzz
