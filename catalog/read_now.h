#pragma once

#include "catalog/block_reader.h"

namespace stillframe::catalog {

// One read and nothing else in flight. `target` has room for `wanted_bytes` rounded up to a block.
// kDataLoss: the file ends before.
Status read_now(uring::IoBackend& io, const OpenPart& part, std::uint64_t offset, Bytes target,
                std::size_t wanted_bytes);

}  // namespace stillframe::catalog
