#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "format/safetensors.h"

namespace stillframe::format {

inline std::string_view name_of(const TensorSpec& tensor) noexcept { return tensor.name; }
inline std::string_view name_of(const PlacedTensor& tensor) noexcept { return tensor.spec.name; }

// One of the items whose name occurs more than once, or null.
//
// Sorts by hash, which a million names with a common prefix need, and by name among equal hashes:
// names made to collide cost no more than a plain sort.
template <class Named>
const Named* find_duplicate(const std::vector<Named>& items) {
  std::vector<std::pair<std::uint64_t, const Named*>> order;
  order.reserve(items.size());
  for (const Named& item : items) {
    const std::string_view name = name_of(item);
    order.emplace_back(hash64(std::as_bytes(std::span(name))), &item);
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first < b.first : name_of(*a.second) < name_of(*b.second);
  });
  const auto twice =
      std::adjacent_find(order.begin(), order.end(), [](const auto& a, const auto& b) {
        return a.first == b.first && name_of(*a.second) == name_of(*b.second);
      });
  return twice == order.end() ? nullptr : twice->second;
}

}  // namespace stillframe::format
