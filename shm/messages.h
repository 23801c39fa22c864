#pragma once

// Control messages as plain structs (flatc's object API: wire::HelloT, wire::AttachT, ...).
// Decoding runs the verifier with explicit limits first; nothing of the packet is kept.

#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"
#include "base/result.h"
#include "shm/control_generated.h"

namespace stillframe::shm {

inline constexpr std::uint32_t kProtocolVersion = 1;
inline constexpr std::size_t kMessageBytesMax = std::size_t{64} << 10;
// A state.json that together with the metrics is no larger travels in BeginSave itself: a memfd
// costs both sides a handful of calls.
inline constexpr std::size_t kInlineStateBytesMax = std::size_t{32} << 10;
inline constexpr std::size_t kLayoutBytesMax = std::size_t{1} << 30;
inline constexpr std::size_t kErrorMessageBytesMax = 2048;

template <class Body>
wire::MessageT make_message(std::uint64_t request, Body body) {
  wire::MessageT message;
  message.request = request;
  message.body.Set(std::move(body));
  return message;
}

// At most kMessageBytesMax, else kInvalidArgument.
Result<std::string> encode(const wire::MessageT& message);
// kInvalidArgument: not a valid Message, or one without a body.
Result<wire::MessageT> decode_message(ConstBytes packet);

Result<std::string> encode(const wire::LayoutT& layout);
// `blob` must be private memory: what another process can still write is copied first (SHM-1).
Result<wire::LayoutT> decode_layout(ConstBytes blob);

wire::FailureT to_wire(const Error& error);
Error from_wire(const wire::FailureT& failure);

}  // namespace stillframe::shm
