#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "client/libstillframe.h"
#include "format/safetensors.h"

namespace stillframe::client {

// A part with what its capture needs again and again. The sources of a part are its header, then
// its tensors in the order of the image.
struct LayoutPart {
  format::PartImage image;
  std::uint64_t slot_offset = 0;
  std::uint32_t extent_count = 0;
  std::vector<std::uint32_t> first_source;  // By extent: the source that its first byte is in.
};

// Where the user's tensor number i went.
struct TensorPlace {
  std::uint32_t part = 0;
  std::uint32_t source = 0;  // Index among the sources of the part: 1 or more.
};

// What one save holds, made once per layout, so that a save itself only fills pointers in.
struct Layout {
  std::vector<LayoutPart> parts;
  std::vector<TensorPlace> tensors;  // In the order in which the user gave them.
  std::string blob;                  // The encoded shm::wire::Layout.
  std::uint64_t slot_bytes = 0;
  std::uint64_t bytes = 0;  // Of all parts.
  std::uint64_t extent_count = 0;

  const format::PlacedTensor& tensor(TensorPlace place) const {
    return parts[place.part].image.tensors[place.source - 1];
  }
};

// kInvalidArgument: what format::place() refuses, a dtype that does not exist, a part without a
// name or twice.
Result<std::shared_ptr<const Layout>> make_layout(std::span<const sf_part> parts);

// Whether `parts` is what `layout` was made of. Allocates nothing.
bool is_same_layout(const Layout& layout, std::span<const sf_part> parts) noexcept;

}  // namespace stillframe::client
