#pragma once

#include <string_view>

#include "base/error.h"

namespace stillframe {

// The Error for a failed system call: what we were doing, the kernel's words and number.
// `doing` names the object: "open /data/run1/manifest.json".
//
// Out of space, memory, descriptors or quota is kResourceExhausted; a missing name kNotFound; a
// refused or malformed request kInvalidArgument; a device or connection that failed kUnavailable;
// anything else kInternal.
Error os_error(std::string_view doing, int number);

}  // namespace stillframe
