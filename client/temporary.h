#pragma once

#include <cstdint>
#include <string>

#include "uring/io_backend.h"

namespace stillframe::client {

// PARENT/.stillframe-tmp-0123456789abcdef: a file, or a directory of parts, that is being written.
std::string temporary_path(const std::string& parent, std::uint64_t nonce);

// Removes what killed writers left in `parent`: temporaries whose files nobody has open any more.
// Errors are ignored: they hinder no save.
void remove_stale_temporaries(uring::IoBackend& io, const std::string& parent);

}  // namespace stillframe::client
