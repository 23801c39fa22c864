#include "shm/messages.h"

#include <algorithm>
#include <memory>

#include "base/text.h"

namespace stillframe::shm {

namespace {

// Depths: Message, its body, a Metric or Failure in it; Layout, Part, Tensor. Twice that leaves
// room for what a newer writer appends.
constexpr flatbuffers::uoffset_t kDepthMax = 8;
// A packet of 64 KiB has room for about 2000 metrics.
constexpr flatbuffers::uoffset_t kMessageTablesMax = 4096;
// 10^6 tensors, each a table, and as many entries of metadata.
constexpr flatbuffers::uoffset_t kLayoutTablesMax = flatbuffers::uoffset_t{1} << 21;

// An encoded table, its offset in a vector and the length and padding of what it refers to take at
// most this, beside the texts and numbers.
constexpr std::uint64_t kTableBytesMax = 64;

Error malformed(std::string_view what) {
  return Error(Code::kInvalidArgument, concat(what, ": not a valid FlatBuffer of this protocol"));
}

// Offsets in a FlatBuffer are aligned relative to its start, so the start has to be aligned too.
class AlignedBytes {
 public:
  explicit AlignedBytes(ConstBytes bytes) : bytes_(bytes) {
    if (reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(std::max_align_t) == 0) return;
    copy_ = std::make_unique_for_overwrite<std::byte[]>(bytes.size());
    std::copy(bytes.begin(), bytes.end(), copy_.get());
    bytes_ = {copy_.get(), bytes.size()};
  }
  const std::uint8_t* data() const { return reinterpret_cast<const std::uint8_t*>(bytes_.data()); }
  std::size_t size() const { return bytes_.size(); }

 private:
  ConstBytes bytes_;
  std::unique_ptr<std::byte[]> copy_;
};

template <class Root>
const Root* verified_root(const AlignedBytes& bytes, flatbuffers::uoffset_t tables_max) {
  flatbuffers::Verifier verifier(bytes.data(), bytes.size(), kDepthMax, tables_max);
  if (!verifier.VerifyBuffer<Root>()) return nullptr;
  return flatbuffers::GetRoot<Root>(bytes.data());
}

// What unpacking copies. Many tables of a FlatBuffer may refer to one string, so that a small
// packet unpacks to gigabytes and still passes the verifier; our writers never share, hence the sum
// of the copies is smaller than the packet and a larger one is refused.
template <class T>
std::uint64_t copied_bytes(const flatbuffers::Vector<T>* vector) {
  return vector == nullptr ? 0 : std::uint64_t{vector->size()} * sizeof(T);
}
std::uint64_t copied_bytes(const flatbuffers::String* text) {
  return text == nullptr ? 0 : text->size();
}
std::uint64_t copied_bytes(const wire::Metric& metric) { return copied_bytes(metric.name()); }
std::uint64_t copied_bytes(const wire::BestKeep& best) { return copied_bytes(best.metric()); }
std::uint64_t copied_bytes(const wire::Tensor& tensor) {
  return copied_bytes(tensor.name()) + copied_bytes(tensor.shape());
}
std::uint64_t copied_bytes(const wire::MetadataEntry& entry) {
  return copied_bytes(entry.key()) + copied_bytes(entry.value());
}
std::uint64_t copied_bytes(const flatbuffers::String& text) { return text.size(); }
std::uint64_t copied_bytes(const wire::Part& part);
template <class Element>
std::uint64_t copied_bytes_of_all(const flatbuffers::Vector<flatbuffers::Offset<Element>>* all) {
  if (all == nullptr) return 0;
  std::uint64_t sum = 0;  // At most 2^21 tables of at most 2^31 bytes each.
  for (const Element* each : *all) sum += copied_bytes(*each);
  return sum;
}
std::uint64_t copied_bytes(const wire::Part& part) {
  return copied_bytes(part.name()) + copied_bytes_of_all(part.tensors()) +
         copied_bytes_of_all(part.metadata());
}
std::uint64_t copied_bytes(const wire::Message& message) {
  // Only these repeat anything.
  if (const auto* save = message.body_as_BeginSave()) {
    return copied_bytes_of_all(save->metrics()) + copied_bytes(save->state());
  }
  if (const auto* attach = message.body_as_Attach()) return copied_bytes_of_all(attach->best());
  if (const auto* reply = message.body_as_AttachReply()) {
    return copied_bytes_of_all(reply->warnings());
  }
  return 0;
}

// The verifier looks at the alignment of a vector's length, not of its elements. Hashes and shapes
// are the only vectors of numbers wider than that.
bool is_aligned(const flatbuffers::Vector<std::uint64_t>* numbers) {
  return numbers == nullptr ||
         reinterpret_cast<std::uintptr_t>(numbers->Data()) % alignof(std::uint64_t) == 0;
}
bool are_hashes_aligned(const wire::Message& message) {
  const auto* chunk = message.body_as_GpuChunk();
  return chunk == nullptr || is_aligned(chunk->hashes());
}
bool are_shapes_aligned(const wire::Layout& layout) {
  if (layout.parts() == nullptr) return true;
  for (const wire::Part* part : *layout.parts()) {
    if (part->tensors() == nullptr) continue;
    for (const wire::Tensor* tensor : *part->tensors()) {
      if (!is_aligned(tensor->shape())) return false;
    }
  }
  return true;
}

template <class Object>
std::string pack(const Object& object, std::size_t guess_bytes) {
  flatbuffers::FlatBufferBuilder builder(guess_bytes);
  builder.Finish(Object::TableType::Pack(builder, &object));
  return {reinterpret_cast<const char*>(builder.GetBufferPointer()), builder.GetSize()};
}

// nullopt: an entry is missing. Cannot overflow: every text of it exists in memory.
std::optional<std::uint64_t> encoded_bytes_max(const wire::LayoutT& layout) {
  std::uint64_t sum = 2 * kTableBytesMax;
  for (const auto& part : layout.parts) {
    if (part == nullptr) return std::nullopt;
    sum += kTableBytesMax + part->name.size();
    for (const auto& tensor : part->tensors) {
      if (tensor == nullptr) return std::nullopt;
      sum += kTableBytesMax + tensor->name.size() + tensor->shape.size() * sizeof(std::uint64_t);
    }
    for (const auto& entry : part->metadata) {
      if (entry == nullptr) return std::nullopt;
      sum += kTableBytesMax + entry->key.size() + entry->value.size();
    }
  }
  return sum;
}

}  // namespace

Result<std::string> encode(const wire::MessageT& message) {
  std::string packet = pack(message, 1024);
  if (packet.size() > kMessageBytesMax) {
    return Error(Code::kInvalidArgument,
                 concat("message: ", wire::EnumNameBody(message.body.type), " has ", packet.size(),
                        " bytes, ", kMessageBytesMax, " fit a packet"));
  }
  return packet;
}

Result<wire::MessageT> decode_message(ConstBytes packet) {
  if (packet.size() > kMessageBytesMax) return malformed("message");
  const AlignedBytes bytes(packet);
  const auto* root = verified_root<wire::Message>(bytes, kMessageTablesMax);
  if (root == nullptr) return malformed("message");
  // The verifier lets two things pass that unpacking does not survive or that nobody could answer:
  // a body's type without a body, and a body of a type that this version does not know.
  if (root->body() == nullptr || root->body_type() == wire::Body::NONE ||
      root->body_type() > wire::Body::MAX) {
    return Error(Code::kInvalidArgument, "message: no body, or one of an unknown type");
  }
  if (!are_hashes_aligned(*root)) return malformed("message");
  if (copied_bytes(*root) > bytes.size()) return malformed("message");
  wire::MessageT message;
  root->UnPackTo(&message);
  return message;
}

Result<std::string> encode(const wire::LayoutT& layout) {
  const auto bytes_max = encoded_bytes_max(layout);
  if (!bytes_max) return Error(Code::kInvalidArgument, "layout: an entry is missing");
  // Checked before, because the builder ends the process at 2 GiB.
  if (*bytes_max > kLayoutBytesMax) {
    return Error(Code::kInvalidArgument, concat("layout: up to ", *bytes_max, " bytes, at most ",
                                                kLayoutBytesMax, " are allowed"));
  }
  return pack(layout, std::size_t{64} << 10);
}

Result<wire::LayoutT> decode_layout(ConstBytes blob) {
  if (blob.size() > kLayoutBytesMax) return malformed("layout");
  const AlignedBytes bytes(blob);
  const auto* root = verified_root<wire::Layout>(bytes, kLayoutTablesMax);
  if (root == nullptr) return malformed("layout");
  if (!are_shapes_aligned(*root)) return malformed("layout");
  if (copied_bytes_of_all(root->parts()) > bytes.size()) return malformed("layout");
  wire::LayoutT layout;
  root->UnPackTo(&layout);
  return layout;
}

wire::FailureT to_wire(const Error& error) {
  std::string_view text = error.message();
  if (text.size() > kErrorMessageBytesMax) {
    std::size_t end = kErrorMessageBytesMax;
    // Not inside a UTF-8 sequence: Python decodes this text.
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0U) == 0x80U) --end;
    text = text.substr(0, end);
  }
  wire::FailureT failure;
  failure.code = static_cast<std::uint8_t>(error.code());
  failure.native = error.native();
  failure.message = text;
  return failure;
}

Error from_wire(const wire::FailureT& failure) {
  // A newer peer may have more codes than we do.
  const Code code = failure.code <= static_cast<std::uint8_t>(Code::kInternal)
                        ? static_cast<Code>(failure.code)
                        : Code::kInternal;
  return Error(code, failure.message, failure.native);
}

}  // namespace stillframe::shm
