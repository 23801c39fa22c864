#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace stillframe::format {

// A small JSON document as a tree; members keep their order.
struct JsonValue {
  enum class Kind : std::uint8_t { kNull, kBool, kNumber, kString, kArray, kObject };
  Kind kind = Kind::kNull;
  bool boolean = false;
  std::string text;               // Of a string, or the digits of a number.
  std::vector<JsonValue> items;   // Of an array, or the values of an object's members.
  std::vector<std::string> keys;  // Of an object: one for each item.
};

// As read_json(); kDataLoss also when a key occurs twice in one object.
Result<JsonValue> read_json_tree(std::string_view text, std::size_t depth_max);

}  // namespace stillframe::format
