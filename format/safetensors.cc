#include "format/safetensors.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <numeric>
#include <optional>
#include <string>

#include "base/text.h"
#include "format/duplicates.h"
#include "format/json.h"
#include "format/names.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

constexpr std::size_t kLengthBytes = 8;
// A file offset is a signed 64-bit number, and the image is rounded up to a block.
constexpr std::uint64_t kPartBytesMax = (std::uint64_t{1} << 63U) - kBlockBytes;

Error bad_part(const PartSpec& part, std::string_view why) {
  return Error(Code::kInvalidArgument, concat("part ", printable(part.name), ": ", why));
}

Status check_spec(const PartSpec& part) {
  if (Status name = check_name("part", part.name); !name) return name;
  if (part.tensors.size() > kTensorCountMax) {
    return bad_part(part, concat(part.tensors.size(), " tensors, at most ", kTensorCountMax));
  }
  for (const TensorSpec& tensor : part.tensors) {
    if (Status name = check_tensor_name(tensor.name); !name) return name;
    if (tensor.shape.size() > kTensorRankMax) {
      return bad_part(part, concat("tensor ", printable(tensor.name), " has ", tensor.shape.size(),
                                   " dimensions, at most ", kTensorRankMax));
    }
  }
  if (const TensorSpec* twice = find_duplicate(part.tensors)) {
    return bad_part(part, concat("tensor ", printable(twice->name), " occurs twice"));
  }
  for (const auto& [key, value] : part.metadata) {
    if (!is_utf8(key) || !is_utf8(value)) {
      return bad_part(part, concat("metadata ", printable(key), " is not UTF-8"));
    }
  }
  return ok();
}

// Largest elements first, as the stock writer does: every tensor is aligned to its elements without
// padding.
std::vector<std::size_t> data_order(const std::vector<TensorSpec>& tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&tensors](std::size_t a, std::size_t b) {
    const std::uint64_t a_bytes = element_bytes(tensors[a].dtype);
    const std::uint64_t b_bytes = element_bytes(tensors[b].dtype);
    return a_bytes != b_bytes ? a_bytes > b_bytes : tensors[a].name < tensors[b].name;
  });
  return order;
}

// Offsets from the first data byte; place() moves them behind the header once that has a length.
Result<std::vector<PlacedTensor>> place_data(const PartSpec& part) {
  std::vector<PlacedTensor> placed;
  placed.reserve(part.tensors.size());
  std::uint64_t end = 0;
  for (const std::size_t index : data_order(part.tensors)) {
    const TensorSpec& spec = part.tensors[index];
    const Result<std::uint64_t> bytes = tensor_bytes(spec);
    if (!bytes) return bytes.error();
    placed.push_back({.spec = spec, .offset = end, .bytes = *bytes});
    const auto next = checked_add(end, *bytes);
    if (!next || *next > kPartBytesMax) {
      return bad_part(part, concat("more than 2^63 bytes at tensor ", printable(spec.name)));
    }
    end = *next;
  }
  return placed;
}

void append_metadata(std::string& json, const std::map<std::string, std::string>& metadata) {
  append_json_string(json, kMetadataKey);
  json.append(":{");
  for (const auto& [key, value] : metadata) {
    append_json_string(json, key);
    json.push_back(':');
    append_json_string(json, value);
    json.push_back(',');
  }
  json.back() = '}';
}

void append_number(std::string& json, std::uint64_t number) {
  std::array<char, 20> digits{};
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number);
  json.append(digits.data(), end.ptr);
}

void append_tensor(std::string& json, const PlacedTensor& tensor) {
  append_json_string(json, tensor.spec.name);
  json.append(":{\"dtype\":\"");
  json.append(name(tensor.spec.dtype));
  json.append("\",\"shape\":[");
  for (const std::uint64_t dimension : tensor.spec.shape) {
    append_number(json, dimension);
    json.push_back(',');
  }
  if (!tensor.spec.shape.empty()) json.pop_back();
  json.append("],\"data_offsets\":[");
  append_number(json, tensor.offset);
  json.push_back(',');
  append_number(json, tensor.offset + tensor.bytes);
  json.append("]}");
}

}  // namespace

std::string encode_header(const std::map<std::string, std::string>& metadata,
                          std::span<const PlacedTensor> tensors, std::uint64_t end_in_block) {
  std::string header(kLengthBytes, '\0');
  header.reserve(kLengthBytes + tensors.size() * 128);
  header.push_back('{');
  if (!metadata.empty()) append_metadata(header, metadata);
  for (const PlacedTensor& tensor : tensors) {
    if (header.size() > kLengthBytes + 1) header.push_back(',');
    append_tensor(header, tensor);
  }
  header.push_back('}');
  std::uint64_t bytes = round_up(header.size(), kBlockBytes) + end_in_block;
  if (bytes >= header.size() + kBlockBytes) bytes -= kBlockBytes;
  header.resize(bytes, ' ');
  store_u64(reinterpret_cast<std::byte*>(header.data()), header.size() - kLengthBytes);
  return header;
}

Result<PartImage> place(const PartSpec& part) {
  if (Status spec = check_spec(part); !spec) return std::move(spec).error();
  Result<std::vector<PlacedTensor>> placed = place_data(part);
  if (!placed) return std::move(placed).error();

  PartImage image{.name = part.name,
                  .header = encode_header(part.metadata, *placed, 0),
                  .tensors = *std::move(placed),
                  .metadata = part.metadata,
                  .bytes = 0};
  if (image.header.size() - kLengthBytes > kHeaderBytesMax) {
    return bad_part(part, concat("its header has ", image.header.size() - kLengthBytes,
                                 " bytes, at most ", kHeaderBytesMax));
  }
  image.bytes = image.header.size();
  for (PlacedTensor& tensor : image.tensors) {
    tensor.offset += image.header.size();
    image.bytes = tensor.offset + tensor.bytes;
  }
  if (image.bytes > kPartBytesMax) return bad_part(part, "more than 2^63 bytes");
  return image;
}

}  // namespace stillframe::format
