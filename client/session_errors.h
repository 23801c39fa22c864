#pragma once

// What a session says of a daemon that is not there, or not one of this protocol.

#include "base/error.h"
#include "base/text.h"

namespace stillframe::client {

inline Error protocol_error(const char* what) {
  return Error(Code::kUnavailable, concat("the daemon broke the protocol: ", what));
}

inline Error gone_error() { return Error(Code::kUnavailable, "not connected to a daemon"); }

}  // namespace stillframe::client
