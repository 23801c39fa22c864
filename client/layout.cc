#include "client/layout.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "base/bytes.h"
#include "base/text.h"
#include "format/manifest.h"
#include "shm/arena.h"
#include "shm/messages.h"

namespace stillframe::client {

namespace wire = shm::wire;

namespace {

Error invalid(std::string message) {
  return Error(Code::kInvalidArgument, concat("layout: ", message));
}

std::span<const std::uint64_t> shape_of(const sf_tensor& tensor) noexcept {
  return {tensor.shape, tensor.dimension_count};
}

Result<format::PartSpec> spec_of(const sf_part& part) {
  if (part.name == nullptr) return invalid("a part has no name");
  if ((part.tensors == nullptr && part.tensor_count != 0) ||
      (part.metadata == nullptr && part.metadata_count != 0)) {
    return invalid(concat("part ", part.name, " has a count without an array"));
  }
  if (part.tensor_count > format::kTensorCountMax) {
    return invalid(concat("part ", part.name, " has ", part.tensor_count, " tensors, at most ",
                          format::kTensorCountMax, " are allowed"));
  }
  format::PartSpec spec{.name = part.name, .tensors = {}, .metadata = {}};
  spec.tensors.reserve(part.tensor_count);
  for (const sf_tensor& tensor : std::span(part.tensors, part.tensor_count)) {
    if (tensor.name == nullptr || (tensor.shape == nullptr && tensor.dimension_count != 0)) {
      return invalid(concat("part ", part.name, ": a tensor has no name or no shape"));
    }
    const auto dtype = tensor.dtype <= std::numeric_limits<std::uint8_t>::max()
                           ? format::dtype_from_number(static_cast<std::uint8_t>(tensor.dtype))
                           : std::nullopt;
    if (!dtype) {
      return invalid(
          concat("tensor ", tensor.name, " has the unknown dtype number ", tensor.dtype));
    }
    const auto shape = shape_of(tensor);
    spec.tensors.push_back(
        {.name = tensor.name, .dtype = *dtype, .shape = {shape.begin(), shape.end()}});
  }
  for (std::uint64_t i = 0; i < part.metadata_count; ++i) {
    const char* const key = part.metadata[2 * i];
    const char* const value = part.metadata[2 * i + 1];
    if (key == nullptr || value == nullptr) {
      return invalid(concat("part ", part.name, ": a metadata entry is NULL"));
    }
    spec.metadata.insert_or_assign(key, value);
  }
  return spec;
}

std::unique_ptr<wire::PartT> wire_of(const format::PartSpec& spec) {
  auto part = std::make_unique<wire::PartT>();
  part->name = spec.name;
  part->tensors.reserve(spec.tensors.size());
  for (const format::TensorSpec& tensor : spec.tensors) {
    auto entry = std::make_unique<wire::TensorT>();
    entry->name = tensor.name;
    entry->dtype = static_cast<std::uint8_t>(tensor.dtype);
    entry->shape = tensor.shape;
    part->tensors.push_back(std::move(entry));
  }
  for (const auto& [key, value] : spec.metadata) {
    auto entry = std::make_unique<wire::MetadataEntryT>();
    entry->key = key;
    entry->value = value;
    part->metadata.push_back(std::move(entry));
  }
  return part;
}

// For each extent the last source that starts at or before it.
std::vector<std::uint32_t> find_first_sources(const LayoutPart& part) {
  std::vector<std::uint32_t> first(part.extent_count, 0);
  std::uint32_t source = 0;
  for (std::uint32_t extent = 0; extent < part.extent_count; ++extent) {
    const std::uint64_t begin = std::uint64_t{extent} * kExtentBytes;
    while (source < part.image.tensors.size() && part.image.tensors[source].offset <= begin) {
      ++source;
    }
    first[extent] = source;
  }
  return first;
}

}  // namespace

Result<std::shared_ptr<const Layout>> make_layout(std::span<const sf_part> parts) {
  if (parts.empty()) return invalid("no part at all");
  auto layout = std::make_shared<Layout>();
  wire::LayoutT wire_layout;
  std::vector<std::uint64_t> image_bytes;
  for (const sf_part& given : parts) {
    auto spec = spec_of(given);
    if (!spec) return std::move(spec).error();
    for (const LayoutPart& other : layout->parts) {
      if (other.image.name == spec->name) return invalid(concat("part ", spec->name, " twice"));
    }
    auto image = format::place(*spec);
    if (!image) return std::move(image).error();
    const std::uint64_t extent_count = format::extent_count(image->bytes);
    if (extent_count > std::numeric_limits<std::uint32_t>::max()) {
      return invalid(concat("part ", spec->name, " has ", image->bytes, " bytes: too many"));
    }

    LayoutPart part;
    part.image = *std::move(image);
    part.extent_count = static_cast<std::uint32_t>(extent_count);
    part.first_source = find_first_sources(part);
    std::unordered_map<std::string_view, std::uint32_t> source_by_name;
    source_by_name.reserve(part.image.tensors.size());
    std::uint32_t source = 0;
    for (const auto& tensor : part.image.tensors) source_by_name[tensor.spec.name] = ++source;
    for (const format::TensorSpec& tensor : spec->tensors) {
      layout->tensors.push_back({.part = static_cast<std::uint32_t>(layout->parts.size()),
                                 .source = source_by_name.at(tensor.name)});
    }
    wire_layout.parts.push_back(wire_of(*spec));
    image_bytes.push_back(part.image.bytes);
    layout->bytes += part.image.bytes;
    layout->extent_count += extent_count;
    layout->parts.push_back(std::move(part));
  }
  auto plan = shm::plan_slot(image_bytes);
  if (!plan) return std::move(plan).error();
  for (std::size_t i = 0; i < layout->parts.size(); ++i) {
    layout->parts[i].slot_offset = plan->part_offsets[i];
  }
  layout->slot_bytes = plan->slot_bytes;
  auto blob = shm::encode(wire_layout);
  if (!blob) return std::move(blob).error();
  layout->blob = *std::move(blob);
  return std::shared_ptr<const Layout>(std::move(layout));
}

bool is_same_layout(const Layout& layout, std::span<const sf_part> parts) noexcept {
  if (parts.size() != layout.parts.size()) return false;
  std::size_t index = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const sf_part& given = parts[p];
    const format::PartImage& image = layout.parts[p].image;
    if (given.name == nullptr || image.name != given.name ||
        image.tensors.size() != given.tensor_count ||
        image.metadata.size() != given.metadata_count ||
        (given.tensors == nullptr && given.tensor_count != 0) ||
        (given.metadata == nullptr && given.metadata_count != 0)) {
      return false;
    }
    for (std::uint64_t t = 0; t < given.tensor_count; ++t, ++index) {
      const sf_tensor& tensor = given.tensors[t];
      const format::TensorSpec& spec = layout.tensor(layout.tensors[index]).spec;
      if (tensor.name == nullptr || (tensor.shape == nullptr && tensor.dimension_count != 0) ||
          spec.name != tensor.name || static_cast<std::uint32_t>(spec.dtype) != tensor.dtype ||
          !std::ranges::equal(spec.shape, shape_of(tensor))) {
        return false;
      }
    }
    for (std::uint64_t i = 0; i < given.metadata_count; ++i) {
      const char* const key = given.metadata[2 * i];
      const char* const value = given.metadata[2 * i + 1];
      if (key == nullptr || value == nullptr) return false;
      const auto entry = std::ranges::find_if(
          image.metadata, [key](const auto& stored) { return stored.first == key; });
      if (entry == image.metadata.end() || entry->second != value) return false;
    }
  }
  return true;
}

}  // namespace stillframe::client
