#pragma once

// A part is one safetensors file. Its bytes in memory are the image, and the image is the file:
//
//   offset  bytes  field
//        0      8  N, length of the header in bytes, little-endian
//        8      N  JSON, then spaces; 8 + N is a multiple of 4096
//      8+N      M  tensor data without holes, in header order
//
// The file ends right after the last tensor byte; an image in memory is followed by zeros up to the
// next multiple of 4096, so that O_DIRECT can write it. docs/FORMAT.md section 2.

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "format/tensor.h"

namespace stillframe::format {

// What a part should hold. `name` is without its suffix: "model" becomes "model.safetensors".
struct PartSpec {
  std::string name;
  std::vector<TensorSpec> tensors;
  std::map<std::string, std::string> metadata;  // safetensors' __metadata__
  bool operator==(const PartSpec&) const = default;
};

struct PlacedTensor {
  TensorSpec spec;
  std::uint64_t offset = 0;  // In the image, from its first byte, so at least 4096.
  std::uint64_t bytes = 0;
};

// A part whose every byte has a place.
struct PartImage {
  std::string name;
  std::string header;                 // The 8 + N first bytes of the image.
  std::vector<PlacedTensor> tensors;  // By offset. Empty tensors share the next one's offset.
  std::map<std::string, std::string> metadata;
  std::uint64_t bytes = 0;  // Exact length of the file.
};

// Bounds for what a file or a client may declare (faults.md section 8).
inline constexpr std::uint64_t kHeaderBytesMax = 100'000'000;  // As in safetensors.
inline constexpr std::size_t kTensorCountMax = 1'000'000;
inline constexpr std::size_t kTensorNameBytesMax = 4096;
inline constexpr std::size_t kTensorRankMax = 32;
// The one name that no tensor can have.
inline constexpr std::string_view kMetadataKey = "__metadata__";

// Orders the tensors by element size falling, then by name (the stock writer's order but for its
// ties between dtypes of one size), gives each its offset and builds the header. Deterministic:
// client and daemon each compute it and must agree.
//
// kInvalidArgument: a part or tensor name is not allowed (names.h), a name occurs twice, a bound
// above or 64 bits are exceeded. The message names the tensor.
Result<PartImage> place(const PartSpec& part);

// The first 8 + N bytes of a file that holds these tensors, one after the other in this order,
// their offsets counted from the first data byte. Spaces fill it until 8 + N leaves `end_in_block`
// (below 4096) when divided by 4096. The names are allowed ones.
std::string encode_header(const std::map<std::string, std::string>& metadata,
                          std::span<const PlacedTensor> tensors, std::uint64_t end_in_block);

// Reads a header back. `head` starts at the file's first byte and holds at least the whole header
// (8 + N bytes; header_bytes() tells N first); `file_bytes` is the file's length.
//
// Strict: offsets start at 0, are contiguous and end at the end of the file; bytes equal shape x
// dtype; names are unique; duplicate keys, unknown members and a malformed shape are refused. A
// foreign header that is not aligned to 4096 is accepted. kDataLoss with the reason.
Result<PartImage> decode_part(std::string_view part_name, ConstBytes head,
                              std::uint64_t file_bytes);

// 8 + N from the first 8 bytes; kDataLoss when N is 0, above kHeaderBytesMax or beyond
// `file_bytes`.
Result<std::uint64_t> header_bytes(ConstBytes first_8_bytes, std::uint64_t file_bytes);

}  // namespace stillframe::format
