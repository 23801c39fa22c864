// The other direction of safetensors.cc: bytes that anybody may have written become a PartImage or
// an error. Nothing is allocated for what a number merely declares.

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>

#include "base/text.h"
#include "format/duplicates.h"
#include "format/json.h"
#include "format/names.h"
#include "format/safetensors.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kDepth = 3;  // The document, a tensor, its shape.

Error damaged(std::string_view part, std::string_view why) {
  return Error(Code::kDataLoss, concat("part ", printable(part), ": ", why));
}

// Builds the tensors while the header streams by. Their offsets count from the first data byte and
// are checked by themselves here; their order and the gaps between them need all of them.
class HeaderReader final : public JsonEvents {
 public:
  std::vector<PlacedTensor> tensors;
  std::map<std::string, std::string> metadata;

  bool on_object_begin() override {
    switch (place_) {
      case Place::kDocument: place_ = Place::kTensors; return accept();
      case Place::kTensorValue: return begin_tensor();
      case Place::kMetadataValue: place_ = Place::kMetadata; return accept();
      default: return misplaced("an object");
    }
  }

  bool on_object_end() override {
    if (place_ == Place::kTensor) return end_tensor();
    place_ = Place::kTensors;  // After __metadata__; after the document nothing follows.
    return accept();
  }

  bool on_array_begin() override {
    if (place_ == Place::kShapeValue)
      place_ = Place::kShape;
    else if (place_ == Place::kOffsetsValue)
      place_ = Place::kOffsets;
    else
      return misplaced("an array");
    return accept();
  }

  bool on_array_end() override {
    if (place_ == Place::kOffsets && offset_count_ != 2)
      return refuse("data_offsets is not a pair");
    place_ = Place::kTensor;
    return accept();
  }

  bool on_key(std::string_view key) override {
    switch (place_) {
      case Place::kTensors: return key == kMetadataKey ? begin_metadata() : begin_name(key);
      case Place::kMetadata: return begin_metadata_entry(key);
      case Place::kTensor: return begin_member(key);
      default: return misplaced("a key");
    }
  }

  bool on_string(std::string_view text) override {
    if (place_ == Place::kMetadataText) {
      metadata_entry_->second = text;
      place_ = Place::kMetadata;
      return accept();
    }
    if (place_ != Place::kDtypeValue) return misplaced("a string");
    const auto dtype = parse_dtype(text);
    if (!dtype) return refuse(concat("dtype ", printable(text), " is not known"));
    current().spec.dtype = *dtype;
    place_ = Place::kTensor;
    return accept();
  }

  bool on_number(std::string_view text) override {
    std::uint64_t number = 0;
    const char* const end = text.data() + text.size();
    const auto parsed = std::from_chars(text.data(), end, number);
    if (parsed.ec != std::errc() || parsed.ptr != end) {
      return refuse(concat(printable(text), " is not an integer from 0 to 2^64 - 1"));
    }
    if (place_ == Place::kShape) return add_dimension(number);
    if (place_ == Place::kOffsets) return add_offset(number);
    return misplaced("a number");
  }

  bool on_bool(bool) override { return misplaced("a boolean"); }
  bool on_null() override { return misplaced("a null"); }

 private:
  // What comes next. `kXValue` is after X's key.
  enum class Place : std::uint8_t {
    kDocument,
    kTensors,
    kMetadataValue,
    kMetadata,
    kMetadataText,
    kTensorValue,
    kTensor,
    kDtypeValue,
    kShapeValue,
    kShape,
    kOffsetsValue,
    kOffsets,
  };

  PlacedTensor& current() { return tensors.back(); }

  bool misplaced(std::string_view what) { return refuse(concat(what, " may not stand here")); }

  bool begin_metadata() {
    if (has_metadata_) return refuse("__metadata__ occurs twice");
    has_metadata_ = true;
    place_ = Place::kMetadataValue;
    return accept();
  }

  bool begin_metadata_entry(std::string_view key) {
    const auto [entry, is_new] = metadata.try_emplace(std::string(key));
    if (!is_new) return refuse(concat("metadata ", printable(key), " occurs twice"));
    metadata_entry_ = entry;
    place_ = Place::kMetadataText;
    return accept();
  }

  bool begin_name(std::string_view tensor) {
    if (tensors.size() == kTensorCountMax) {
      return refuse(concat("more than ", kTensorCountMax, " tensors"));
    }
    if (const Status name = check_tensor_name(tensor); !name) {
      return refuse(std::string(name.error().message()));
    }
    tensors.emplace_back().spec.name = tensor;
    place_ = Place::kTensorValue;
    return accept();
  }

  bool begin_tensor() {
    has_dtype_ = has_shape_ = has_offsets_ = false;
    offset_count_ = 0;
    place_ = Place::kTensor;
    return accept();
  }

  bool begin_member(std::string_view key) {
    if (key == "dtype") return begin_member(has_dtype_, Place::kDtypeValue, key);
    if (key == "shape") return begin_member(has_shape_, Place::kShapeValue, key);
    if (key == "data_offsets") return begin_member(has_offsets_, Place::kOffsetsValue, key);
    return refuse(concat("tensor ", printable(current().spec.name), ": member ", printable(key),
                         " is not known"));
  }

  bool begin_member(bool& has_member, Place next, std::string_view key) {
    if (has_member) return refuse(concat(printable(key), " occurs twice"));
    has_member = true;
    place_ = next;
    return accept();
  }

  bool add_dimension(std::uint64_t dimension) {
    if (current().spec.shape.size() == kTensorRankMax) {
      return refuse(concat("more than ", kTensorRankMax, " dimensions"));
    }
    current().spec.shape.push_back(dimension);
    return accept();
  }

  bool add_offset(std::uint64_t offset) {
    if (offset_count_ == 2) return refuse("data_offsets is not a pair");
    (offset_count_ == 0 ? current().offset : end_) = offset;
    ++offset_count_;
    return accept();
  }

  bool end_tensor() {
    PlacedTensor& tensor = current();
    if (!has_dtype_ || !has_shape_ || !has_offsets_) {
      return refuse(
          concat("tensor ", printable(tensor.spec.name), " lacks dtype, shape or data_offsets"));
    }
    const Result<std::uint64_t> bytes = tensor_bytes(tensor.spec);
    if (!bytes) return refuse(std::string(bytes.error().message()));
    if (end_ < tensor.offset || end_ - tensor.offset != *bytes) {
      return refuse(concat("tensor ", printable(tensor.spec.name), ": data_offsets [",
                           tensor.offset, ", ", end_, "] but ", *bytes, " bytes by its shape"));
    }
    tensor.bytes = *bytes;
    place_ = Place::kTensors;
    return accept();
  }

  Place place_ = Place::kDocument;
  bool has_metadata_ = false;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  int offset_count_ = 0;
  std::uint64_t end_ = 0;
  std::map<std::string, std::string>::iterator metadata_entry_;
};

// By offset; an empty tensor comes before the one that shares its offset, and the header's order
// decides among empty ones.
void sort_by_offset(std::vector<PlacedTensor>& tensors) {
  const auto is_before = [](const PlacedTensor& a, const PlacedTensor& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
  };
  if (std::is_sorted(tensors.begin(), tensors.end(), is_before)) return;
  std::stable_sort(tensors.begin(), tensors.end(), is_before);
}

}  // namespace

Result<std::uint64_t> header_bytes(ConstBytes first_8_bytes, std::uint64_t file_bytes) {
  if (first_8_bytes.size() < kLengthBytes || file_bytes < kLengthBytes) {
    return Error(Code::kDataLoss, concat("a part of ", std::min<std::uint64_t>(file_bytes, 8),
                                         " bytes has no room for its header's length"));
  }
  const std::uint64_t json_bytes = load_u64(first_8_bytes.data());
  if (json_bytes == 0 || json_bytes > kHeaderBytesMax || json_bytes > file_bytes - kLengthBytes) {
    return Error(Code::kDataLoss,
                 concat("the header's length is ", json_bytes, ", but the file has ", file_bytes,
                        " bytes and a header 1 to ", kHeaderBytesMax));
  }
  return kLengthBytes + json_bytes;
}

Result<PartImage> decode_part(std::string_view part_name, ConstBytes head,
                              std::uint64_t file_bytes) {
  const Result<std::uint64_t> bytes = header_bytes(head, file_bytes);
  if (!bytes) return damaged(part_name, bytes.error().message());
  if (head.size() < *bytes) {
    return damaged(part_name, concat("its header has ", *bytes, " bytes, but ", head.size(),
                                     " of them are here"));
  }
  const std::string_view header(reinterpret_cast<const char*>(head.data()), *bytes);
  std::string_view json = header.substr(kLengthBytes);
  // Padding is spaces behind the object; anything else there could be a second file in disguise.
  json = json.substr(0, json.find_last_not_of(' ') + 1);
  if (!json.starts_with('{') || !json.ends_with('}')) {
    return damaged(part_name, "its header is not one JSON object followed by spaces");
  }

  HeaderReader reader;
  if (Status read = read_json(json, kDepth, reader); !read) {
    if (read.error().code() != Code::kDataLoss) return std::move(read).error();
    return damaged(part_name, read.error().message());
  }
  if (const PlacedTensor* twice = find_duplicate(reader.tensors)) {
    return damaged(part_name, concat("tensor ", printable(twice->spec.name), " occurs twice"));
  }
  sort_by_offset(reader.tensors);

  std::uint64_t end = header.size();
  for (PlacedTensor& tensor : reader.tensors) {
    // Both sums stay in 64 bits: the tensors so far fit into the file, and this one begins where
    // they end.
    if (tensor.offset != end - header.size() || tensor.bytes > file_bytes - end) {
      return damaged(part_name,
                     concat("tensor ", printable(tensor.spec.name), " begins at ", tensor.offset,
                            " and has ", tensor.bytes, " bytes; expected at ", end - header.size(),
                            " with at most ", file_bytes - end));
    }
    tensor.offset = end;
    end += tensor.bytes;
  }
  if (end != file_bytes) {
    return damaged(part_name,
                   concat("the file has ", file_bytes, " bytes, its header ends at ", end));
  }
  return PartImage{.name = std::string(part_name),
                   .header = std::string(header),
                   .tensors = std::move(reader.tensors),
                   .metadata = std::move(reader.metadata),
                   .bytes = file_bytes};
}

}  // namespace stillframe::format
