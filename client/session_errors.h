#pragma once

// What a session says of its own end, and of a daemon that is not there or not one of this
// protocol.

#include "base/error.h"
#include "base/text.h"

namespace stillframe::client {

inline Error protocol_error(const char* what) {
  return Error(Code::kUnavailable, concat("the daemon broke the protocol: ", what));
}

// Short, so that destructors need no memory for it.
inline Error closed_error() noexcept { return Error(Code::kCancelled, "session closed"); }

inline Error gone_error() { return Error(Code::kUnavailable, "not connected to a daemon"); }

}  // namespace stillframe::client
