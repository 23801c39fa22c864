#pragma once

#include <new>
#include <utility>

#include "base/error.h"

namespace stillframe {

// Short enough to need no memory itself.
inline Error out_of_memory() noexcept { return Error(Code::kResourceExhausted, "out of memory"); }

// Runs `body`, which returns a Result; a lack of memory becomes one more Error of it. For threads,
// which an exception must not leave, and for clean-up that has to go on.
template <class Body>
auto or_out_of_memory(Body&& body) noexcept -> decltype(body()) {
  try {
    return std::forward<Body>(body)();
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
}

}  // namespace stillframe
