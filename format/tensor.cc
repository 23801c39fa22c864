#include "format/tensor.h"

#include <array>

#include "base/bytes.h"
#include "base/check.h"
#include "base/text.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

struct DtypeFacts {
  std::string_view name;
  std::uint64_t bytes;
};

// In the order of the wire numbers.
constexpr std::array<DtypeFacts, 19> kDtypes = {{
    {"BOOL", 1},        {"U8", 1},          {"I8", 1},      {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"F8_E4M3FNUZ", 1}, {"F8_E5M2FNUZ", 1}, {"F8_E8M0", 1}, {"I16", 2},     {"U16", 2},
    {"F16", 2},         {"BF16", 2},        {"I32", 4},     {"U32", 4},     {"F32", 4},
    {"I64", 8},         {"U64", 8},         {"F64", 8},     {"C64", 8},
}};
static_assert(kDtypes[static_cast<std::size_t>(Dtype::kI16)].name == "I16");
static_assert(kDtypes[static_cast<std::size_t>(Dtype::kC64)].name == "C64");

const DtypeFacts& facts(Dtype dtype) noexcept {
  const auto number = static_cast<std::size_t>(dtype);
  check(number < kDtypes.size(),
        "a dtype from outside passed dtype_from_number() or parse_dtype()");
  return kDtypes[number];
}

}  // namespace

std::string_view name(Dtype dtype) noexcept { return facts(dtype).name; }

std::uint64_t element_bytes(Dtype dtype) noexcept { return facts(dtype).bytes; }

std::optional<Dtype> parse_dtype(std::string_view name) noexcept {
  for (std::size_t number = 0; number < kDtypes.size(); ++number) {
    if (kDtypes[number].name == name) return static_cast<Dtype>(number);
  }
  return std::nullopt;
}

std::optional<Dtype> dtype_from_number(std::uint8_t number) noexcept {
  if (number >= kDtypes.size()) return std::nullopt;
  return static_cast<Dtype>(number);
}

Result<std::uint64_t> tensor_bytes(const TensorSpec& spec) {
  // The product skips zeros and is checked all the same, so that whether a shape is accepted does
  // not depend on the order of its dimensions.
  std::optional<std::uint64_t> bytes = element_bytes(spec.dtype);
  bool is_empty = false;
  for (const std::uint64_t dimension : spec.shape) {
    is_empty |= dimension == 0;
    if (dimension != 0 && bytes) bytes = checked_multiply(*bytes, dimension);
  }
  if (!bytes) {
    return Error(Code::kInvalidArgument,
                 concat("tensor ", printable(spec.name), ": its shape needs more than 2^64 bytes"));
  }
  return is_empty ? 0 : *bytes;
}

}  // namespace stillframe::format
