#include "base/check.h"
#include "format/file_hashes.h"
#include "format/manifest.h"
#include "format/names.h"
#include "format/safetensors.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

using namespace format;

bool part_header(ConstBytes input) {
  if (input.size() < 8) return false;
  const std::uint64_t file_bytes = load_u64(input.data());
  const ConstBytes head = input.subspan(8);
  const auto image = decode_part("model", head, file_bytes);
  if (!image) {
    check(image.error().code() == Code::kDataLoss, "bad bytes are data loss");
    check(image.error().message().size() < 10'000, "a message stays printable");
    return false;
  }

  const auto header_end = header_bytes(head, file_bytes);
  check(header_end && image->header.size() == *header_end, "the header ends where its length says");
  PartSpec spec{.name = image->name, .tensors = {}, .metadata = image->metadata};
  std::uint64_t end = image->header.size();
  for (const PlacedTensor& tensor : image->tensors) {
    check(tensor.offset == end, "tensors are contiguous");
    const auto bytes = tensor_bytes(tensor.spec);
    check(bytes && tensor.bytes == *bytes, "bytes are shape x dtype");
    check(check_tensor_name(tensor.spec.name).has_value(), "a name is a name");
    end += tensor.bytes;
    spec.tensors.push_back(tensor.spec);
  }
  check(end == file_bytes && image->bytes == file_bytes, "the last tensor ends the file");

  if (has_file_hashes(*image)) {
    const auto hashes = decode_file_hashes(*image);
    check(hashes || hashes.error().code() == Code::kDataLoss, "bad hashes are data loss");
    check(!hashes || hashes->size() == extent_count(file_bytes), "one hash for each extent");
  }

  // What anybody wrote, we can write; and what we write reads back byte for byte.
  const auto ours = place(spec);
  if (!ours) return true;  // A header that only grows beyond its bound by our spelling of it.
  const auto again = decode_part("model", std::as_bytes(std::span(ours->header)), ours->bytes);
  check(again.has_value(), "our own header is accepted");
  check(again->header == ours->header && again->metadata == image->metadata, "round trip");
  check(again->tensors.size() == image->tensors.size(), "no tensor is lost");
  return true;
}

}  // namespace stillframe::fuzz
