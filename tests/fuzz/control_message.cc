#include "base/check.h"
#include "shm/messages.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

bool control_message(ConstBytes input) {
  const auto message = shm::decode_message(input);
  if (!message) {
    check(message.error().code() == Code::kInvalidArgument, "a peer's fault");
    return false;
  }
  check(message->body.type != shm::wire::Body::NONE && message->body.value != nullptr,
        "whoever switches over the body finds one");
  // An input may share tables, which the encoder does not: it can be too long then.
  const auto packet = shm::encode(*message);
  if (!packet) return true;
  const auto again = shm::decode_message(std::as_bytes(std::span(*packet)));
  check(again.has_value(), "what we write can be read");
  const auto packet_again = shm::encode(*again);
  check(packet_again && *packet_again == *packet, "a message has one encoding");
  return true;
}

}  // namespace stillframe::fuzz
