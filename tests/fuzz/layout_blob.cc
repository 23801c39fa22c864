#include "base/check.h"
#include "shm/messages.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

bool layout_blob(ConstBytes input) {
  const auto layout = shm::decode_layout(input);
  if (!layout) {
    check(layout.error().code() == Code::kInvalidArgument, "a peer's fault");
    return false;
  }
  for (const auto& part : layout->parts) {
    check(part != nullptr, "no part is missing");
    for (const auto& tensor : part->tensors) check(tensor != nullptr, "no tensor is missing");
    for (const auto& entry : part->metadata) check(entry != nullptr, "no entry is missing");
  }
  const auto blob = shm::encode(*layout);
  check(blob.has_value(), "what can be read can be written");
  const auto again = shm::decode_layout(std::as_bytes(std::span(*blob)));
  check(again.has_value(), "what we write can be read");
  const auto blob_again = shm::encode(*again);
  check(blob_again && *blob_again == *blob, "a layout has one encoding");
  return true;
}

}  // namespace stillframe::fuzz
