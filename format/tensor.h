#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace stillframe::format {

// The element types of safetensors 0.8 that occupy whole bytes. The values are Stillframe's wire
// numbers (shm/control.fbs carries them), so they never change.
enum class Dtype : std::uint8_t {
  kBool = 0,
  kU8 = 1,
  kI8 = 2,
  kF8E4M3 = 3,
  kF8E5M2 = 4,
  kF8E4M3Fnuz = 5,
  kF8E5M2Fnuz = 6,
  kF8E8M0 = 7,
  kI16 = 8,
  kU16 = 9,
  kF16 = 10,
  kBF16 = 11,
  kI32 = 12,
  kU32 = 13,
  kF32 = 14,
  kI64 = 15,
  kU64 = 16,
  kF64 = 17,
  kC64 = 18,
};

std::string_view name(Dtype dtype) noexcept;  // As safetensors spells it: "BF16".
std::optional<Dtype> parse_dtype(std::string_view name) noexcept;
std::optional<Dtype> dtype_from_number(std::uint8_t number) noexcept;  // From the wire.
std::uint64_t element_bytes(Dtype dtype) noexcept;

struct TensorSpec {
  std::string name;
  Dtype dtype = Dtype::kU8;
  std::vector<std::uint64_t> shape;  // Empty: one element (a 0-d tensor).
  bool operator==(const TensorSpec&) const = default;
};

// Product of the shape times the element size. kInvalidArgument when it overflows 64 bits.
Result<std::uint64_t> tensor_bytes(const TensorSpec& spec);

}  // namespace stillframe::format
